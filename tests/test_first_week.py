"What a user does in the first week, and gets wrong: refused with a sentence, or done right"
from common import *

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
def learner(model=None, **kwargs): return seeded(data(bs=32), mlp() if model is None else model, **kwargs)

@pytest.mark.parametrize('weight,gives', [(lambda pct: -1, 'gives -1 at progress 0, expected'), (lambda pct: math.nan, 'gives nan at'),
                                          (SchedLin(1, -1), 'gives -0.'), (lambda pct: None, 'is no schedule'), (lambda: 1, 'is no schedule')])
@pytest.mark.parametrize('where', ['term', 'task', 'penalty'])
def test_a_schedule_that_gives_no_weight(weight, gives, where):
    cb = {'term': lambda: KnowledgeDistillation(mlp(), KD()*weight), 'task': lambda: KnowledgeDistillation(mlp(), KD(), task=weight),
          'penalty': lambda: LossTerm(lambda cb: cb.pred.pow(2).mean(), weight)}[where]()
    with pytest.raises(ValueError, match=gives): quiet(learner(cbs=cb), 2)

def test_annealers_end_at_0(): assert [weight_at(o, 1.) for o in (SchedLin(1, 0), SchedCos(.3, 0), SchedPoly(.1, 0, 2))] == [0]*3

numbers = dict(float32=np.float32, float64=np.float64)
@pytest.mark.parametrize('to', numbers.values(), ids=numbers)
def test_numbers_of_numpy(to):
    net = prune_model(nn.Sequential(nn.Linear(5, 4)), to(.2))
    assert net[0].weight.eq(0).sum()==4          # a fifth of 20, not 5 of them
    learn = quiet(learner(), 1, cbs=[KnowledgeDistillation(mlp(), KD(T=to(4))*to(.5), task=to(.1)), Pruner(to(.5), schedule='gradual', rounds=np.int64(3))])
    assert sparsity(learn.model)==.5
    assert (KD()*to(.5)).weight==(to(.5)*KD()).weight==.5 and KD(teacher=np.int64(1)).teacher==1

def test_terms_add_up_in_a_sum():
    terms = [KD(T=4)*.9, FitNet('1')/4]
    assert repr(sum(terms))==repr(terms[0]+terms[1]) and repr(sum(terms)/2)==repr(sum(terms)*.5)
    assert [t.weight for t in (sum(terms)+sum(terms)).terms]==[.9,.25]*2
    with pytest.raises(ValueError, match='terms is 1, expected a term'): 1+KD()
    with pytest.raises(ValueError, match='weight is -0.5'): KD()/-2

@pytest.mark.parametrize('share', [lambda s,t: s.__setitem__(1, t[1]), lambda s,t: setattr(s[3], 'weight', t[3].weight),
                                   lambda s,t: setattr(s[1], 'bias', t[1].bias)], ids=['a layer','a weight','a bias'])
@pytest.mark.parametrize('terms', [None, KD()+FitNet('1')], ids=['logits','layers'])
def test_a_teacher_that_would_be_trained(share, terms):
    student,teacher = mlp(),mlp()
    share(student, teacher)
    was = state(teacher)
    with pytest.raises(ValueError, match=r'teacher and student share \d.(weight|bias), and training'): quiet(learner(student), 1, cbs=KnowledgeDistillation(teacher, terms))
    assert same(state(teacher), was)

def test_a_teacher_whose_frozen_part_is_shared_stays():
    student,teacher = mlp(),mlp()
    student[1] = teacher[1].requires_grad_(False)
    was = state(teacher)
    quiet(learner(student), 1, cbs=KnowledgeDistillation(teacher))
    assert same(state(teacher), was)

def test_batch_statistics_are_not_shared():
    student,teacher = (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, affine=False), nn.Linear(64, 10)) for _ in range(2))
    student[1] = teacher[1]
    with pytest.raises(ValueError, match='share 1.running_mean'): quiet(learner(student), 1, cbs=KnowledgeDistillation(teacher))

callbacks = dict(Pruner=lambda: Pruner(.5), KD=lambda: KnowledgeDistillation(mlp()), penalty=lambda: Penalty())
@pytest.mark.parametrize('cb', callbacks.values(), ids=callbacks)
def test_a_training_without_a_batch(cb):
    learn = learner()
    learn.dls.train.drop_last,learn.dls.train.bs = True,1000
    with pytest.raises(ValueError, match='nothing is trained: the training set has 181 samples, which make no batch of 1000'): quiet(learn, 1, cbs=cb())
    assert learn.metrics.attrgot('name')==['accuracy'] and '_with_events' not in vars(learn)

@pytest.mark.parametrize('cb', callbacks.values(), ids=callbacks)
@pytest.mark.parametrize('event', ['after_batch','after_epoch','before_validate','before_batch'])
def test_a_callback_is_taken_away_in_the_middle(cb, event):
    class Away(Callback):
        order = 200
        def __call__(self, name):
            if name==event and self.learn.epoch==0 and theirs in self.learn.cbs: self.learn.remove_cb(theirs)
    theirs = cb()
    learn = quiet(learner(cbs=[theirs, Away()]), 3)
    assert learn.metrics.attrgot('name')==['accuracy'] and '_with_events' not in vars(learn)
    assert theirs.learn is None and not any(m._forward_hooks for m in learn.model.modules())
    assert len(learn.recorder.values)==3
    quiet(learn, 1)

def test_a_pruner_moves():
    a,b,cb = learner(),learner(),Pruner(.5)
    a.add_cb(cb); b.add_cb(cb)
    assert cb not in a.cbs
    with pytest.raises(ValueError, match='this Pruner is in the learner already'): b.add_cb(cb)
    quiet(a, 1); quiet(b, 1)
    assert (sparsity(a.model), sparsity(b.model))==(0,.5)

@pytest.mark.parametrize('schedule,said', [(SchedLin(0, .8), r'schedule\(1\) is 0.8, expected 1'), (SchedLin(1, 0), 'falls from 0.9 at 0.1 to 0.8'),
                                           (lambda t: 4*t*(1-t), 'falls')])
def test_no_course_of_pruning(schedule, said):
    with pytest.raises(ValueError, match=said): Pruner(.8, schedule=schedule)

@pytest.mark.parametrize('given', [.5, (.5,), (.8,.5), 'late'])
def test_no_cooldown(given):
    with pytest.raises(ValueError, match='expected \\(start, end\\)'): VariationalSparsifier(cooldown=given)
