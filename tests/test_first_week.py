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

# Settings that make no sense

numbers_of_terms = [(DKD, 'alpha', -1), (DKD, 'beta', '8'), (DIST, 'beta', -.1), (DIST, 'gamma', math.nan), (partial(AT, '1'), 'p', 0), (partial(RKD, '1'), 'distance', -25),
    (partial(RKD, '1'), 'angle', math.inf), (partial(VID, '1'), 'depth', 1.5), (partial(VID, '1'), 'hidden', 0), (partial(VID, '1'), 'variance', -1), (partial(VID, '1'), 'eps', 0),
    (partial(VIDLP, '1'), 'variance', 1e-6), (partial(CRD, '1'), 'dim', 0), (partial(CRD, '1'), 'K', -3), (partial(CRD, '1'), 'momentum', 2), (partial(ReviewKD, ['1','3']), 'width', -8),
    (partial(SemCKD, ['1'], ['1']), 'bs', 0), (partial(SemCKD, ['1'], ['1']), 'factor', .5), (partial(SimKD, '1'), 'factor', 0)]
@pytest.mark.parametrize('make,name,given', numbers_of_terms, ids=lambda o: getattr(getattr(o, 'func', o), '__name__', None))
def test_a_number_that_no_term_can_mean(make, name, given):
    with pytest.raises(ValueError, match=rf'^{name} is {given!r}, expected a (whole )?number'): make(**{name: given})

def test_every_number_of_a_term_is_checked():
    "Each float or int that a term takes is in the list above, or is a temperature or the place of a teacher"
    import inspect
    listed = {(getattr(f, 'func', f).__name__,n) for f,n,_ in numbers_of_terms}
    for cls in (KD, BinaryKD, LogitsMSE, DKD, DIST, LwF, DistillToken, AT, NST, SP, PKT, RKD, FSP, FitNet, VID, VIDLP, CRD, SRRL, SemCKD, SimKD, ReviewKD, CC, ICKD):
        for n,p in inspect.signature(cls).parameters.items():
            if n in ('T','teacher') or isinstance(p.default, bool): continue
            if isinstance(p.default, (int,float)) or 'int' in str(p.annotation): assert (cls.__name__,n) in listed or (cls,n)==(VIDLP,'eps'), (cls, n)

@pytest.mark.parametrize('T,said', [(lambda pct: -1., 'T gives -1 at progress 0'), (lambda pct: 0., 'T is 0.0, expected a temperature')])
@pytest.mark.parametrize('cb', [lambda T: KnowledgeDistillation(mlp(), KD(T=T)), lambda T: MutualLearning(learner(), T=T)], ids=['KD','mutual'])
def test_a_schedule_of_temperatures_below_zero(T, said, cb):
    with pytest.raises(ValueError, match=said): quiet(learner(cbs=cb(T)), 1)

choices = [('fit is .foo., expected the name of a fit method', lambda: iterative_prune(learner(), .5, fit='foo')), ('fit is .freeze.', lambda: learner().distill(mlp(), 1, fit='freeze')),
    ('fit is .x.', lambda: learner().compress_to(macs=.5, fit='x')), ('tune is .fit., expected a function', lambda: sweep_sparsity(learner(), .5, tune='fit')),
    ('init is .he., expected a function', lambda: design_student(mlp(), data(), init='he')), ('rounding is .up.', lambda: design_student(mlp(), data(), rounding='up')),
    ('noise is .x.', lambda: to_variational(mlp(), groups='weights', noise='x')), ('groups is .x.', lambda: to_variational(mlp(), groups='x')),
    ('cap is -1, expected a number above 0', lambda: VariationalSparsifier(cap=-1)), ('start is .0., expected a fraction', lambda: Pruner(start='0')),
    ('ignore holds 3, expected paths', lambda: prune_model(mlp(), ignore=3)), ('n_epoch is -1', lambda: iterative_prune(learner(), .5, n_epoch=-1)), ('rewind_to is .1.', lambda: iterative_prune(learner(), rewind_to='1')),
    ('max_drop is -1', lambda: learner(to_variational(mlp(), data())).compress('accuracy', max_drop=-1)), ('update_bn is -1', lambda: sensitivity(learner(), update_bn=-1)),
    ('tol is -1', lambda: shrink(mlp(), data(), tol=-1)), ('update_bn is .x.', lambda: shrink(mlp(), data(), update_bn='x')), ('data is .x., expected DataLoaders', lambda: shrink(mlp(), 'x')),
    ('data is None, expected', lambda: layer_shapes(mlp(), None)), ('learn is a Sequential, expected a Learner', lambda: iterative_prune(mlp())), ('learn is a Sequential', lambda: sweep_sparsity(mlp())),
    ('learn is a Sequential', lambda: sensitivity(mlp())), ('cache is 3', lambda: KnowledgeDistillation(mlp(), cache=3)), ('n_views is 0', lambda: KnowledgeDistillation(mlp(), cache=True, n_views=0)),
    ('int8 is .x.', lambda: to_onnx(mlp(), data(), 'never.onnx', int8='x'))]
@pytest.mark.parametrize('said,f', choices, ids=[o[0][:20] for o in choices])
def test_the_message_names_what_was_given(said, f):
    with pytest.raises(ValueError, match=said): f()

@pytest.mark.parametrize('gives', [lambda cb: 'x', lambda cb: 3., lambda cb: cb.pred.mean(1)])
def test_a_term_that_gives_no_scalar(gives):
    with pytest.raises(ValueError, match="the term 'mine' gives .*, expected a scalar tensor"): quiet(learner(cbs=LossTerm(gives, name='mine')), 1)

def test_a_learner_stands_for_its_network_and_its_data():
    learn = learner(prune_model(mlp(), .5, by='channel', data=data()))
    a,b = shrink(learn, learn),shrink(learn.model, learn.dls)
    assert same(state(a), state(b)) and a[1].out_features==8 and max_difference(learn, a, learn.dls.valid)<1e-12
    assert sparsity(learn)==sparsity(learn.model)>0 and layer_shapes(learn, learn).equals(layer_shapes(learn.model, learn.dls))

def test_left_out_is_said_only_where_something_is():
    for kwargs,said in ((dict(), r'can be removed \(1: they'), (dict(ignore='1'), 'can be removed besides those left out')):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64,10)) if not kwargs else mlp()
        with pytest.raises(ValueError, match=said): prune_model(net, by='channel', data=data(), **kwargs)

# Networks that cannot be cut (yet)

def test_a_variational_network_is_not_shrunken():
    learn = learner(to_variational(mlp(), data()))
    for f in (learn.shrink, lambda: shrink(learn.model, data())):
        with pytest.raises(ValueError, match=r"GroupLinear '1' is variational(.|\n)*Call learn.compress\(\)"): f()
    for m in noise_groups(learn.model).values(): m.gamma_logvar.data[:5] = 9.
    small = learn.compress()
    assert not variational_layers(small) and small[3].in_features==11
    assert same(state(shrink(to_deterministic(learn.model), data())), state(small))

def scripts():
    net = nn.Sequential(nn.Flatten(), torch.jit.script(nn.Linear(64, 16)), nn.ReLU(), nn.Linear(16, 10))
    return dict(scripted=torch.jit.script(mlp()), traced=torch.jit.trace(mlp().eval(), torch.randn(2,1,8,8)), inside=net)
acts = dict(prune_model=lambda m: prune_model(m, .5), Pruner=lambda m: quiet(learner(m, cbs=Pruner(.5)), 1), shrink=lambda m: shrink(m, data()), learn_shrink=lambda m: learner(m).shrink(),
    to_variational=to_variational, to_onnx=lambda m: to_onnx(m, data(), 'never.onnx'), compress_to=lambda m: learner(m).compress_to(macs=.5), sparsity=sparsity,
    features=lambda m: quiet(learner(mlp()), 1, cbs=KnowledgeDistillation(m, FitNet('1'))))
@pytest.mark.parametrize('which', ['scripted','traced','inside'])
@pytest.mark.parametrize('act', acts.values(), ids=acts)
def test_torchscript_is_refused(which, act):
    with pytest.raises(ValueError, match='is a TorchScript module(.|\n)*module of Python'): act(scripts()[which])

@pytest.mark.parametrize('terms', [None, KD()+FitNet('1')], ids=['logits','layers'])
@pytest.mark.parametrize('which', ['scripted','traced'])
def test_torchscript_is_no_student(which, terms):
    learn = learner(scripts()[which])
    with pytest.raises(ValueError, match='the student is a TorchScript module'): quiet(learn, mlp(), 1, terms, fit='distill')
    assert not learn.cbs.filter(lambda c: isinstance(c, KnowledgeDistillation))

@pytest.mark.parametrize('which', ['scripted','traced'])
@pytest.mark.parametrize('cache', [False, True])
def test_torchscript_teaches(which, cache):
    student,teacher = mlp(),mlp()
    def taught(t): return flat(quiet(learner(deepcopy(student)), t, 1, fit='distill', lr=.1, cache=cache).model)
    script = torch.jit.script(teacher) if which=='scripted' else torch.jit.trace(teacher.eval(), torch.randn(2,1,8,8))
    assert torch.allclose(taught(script), taught(teacher), atol=1e-5) and not torch.allclose(taught(teacher), flat(student), atol=1e-3)
