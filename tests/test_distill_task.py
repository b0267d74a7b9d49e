"Distillation knows the task, whose classes and images the teacher's are, and what its answers are; terms of one's own have a name."
import timm.loss
import pytest
import torch.nn.modules.loss as losses
from common import CPUAutocast, X, Y, data, flat, here, quiet, same, seeded, state
from kdnb.all import *
import kdnb.all, kdnb.distill.terms as registry

def _loss_name(o):
    "Without the address, which differs from process to process"
    o = getattr(o, 'func', o)
    return getattr(o, '__qualname__', type(o).__name__)


IMAGES = X.float()/255
LABELS = torch.stack([Y%2==0, Y>=5, torch.isin(Y, torch.tensor([2,3,5,7], device=Y.device))], 1).float()       # even, large, prime
NUMBERS = torch.stack([torch.cos(Y*.6), torch.sin(Y*.6), Y/9], 1)

def mlp(c, hidden=16, seed=1): set_seed(seed); return here(nn.Sequential(nn.Flatten(), nn.Linear(64,hidden), nn.ReLU(), nn.Linear(hidden,c)))
def conv(c, seed=2): set_seed(seed); return here(nn.Sequential(nn.Conv2d(1,8,3), nn.ReLU(), nn.Flatten(), nn.Linear(288,c)))

def foreign(y, x=None, bs=67):
    "Plain fastai `DataLoaders`, item by item"
    items = list(zip(IMAGES if x is None else x, y))
    return DataLoaders(DataLoader(items, bs=bs, shuffle=True), DataLoader(items, bs=bs), device=default_device())

def learner(y, loss, model=None, **kwargs):
    dls = foreign(y)
    set_seed(0); dls.train.rng = random.Random(0)
    learn = Learner(dls, model or mlp(y[0].numel() if y.is_floating_point() else 10), loss_func=loss, **kwargs)
    learn.recorder.add_time = False
    return learn

def chosen(learn, teacher, **kwargs):
    "The terms that a training without named terms takes"
    kd = KnowledgeDistillation(teacher, **kwargs)
    quiet(learn, 1, 1e-3, cbs=kd)
    assert learn.recorder.metric_names[-1]==list(kd.terms)[0] and len(kd.terms)==1 and learn.recorder.values[-1][-1]>0
    return {k: (type(t),t.weight) for k,t in kd.terms.items()} | dict(task=kd.task)

class Mine(nn.BCEWithLogitsLoss): pass
class Wrapped(nn.Module):
    def __init__(self, loss): super().__init__(); self.loss = loss
    def forward(self, z, y): return 2*self.loss(z, y)
class Method:
    def __init__(self): self.f = nn.BCEWithLogitsLoss()
    def loss(self, z, y): return self.f(z, y)
def around(f): return lambda z,y: f(z, y)
def own_bce(z, y): return (F.softplus(z) - z*y).mean()
def smoothed(z, y): return own_bce(z, y*.9+.05)
def focal(z, y): return ((z.sigmoid()-y).abs()**2*F.binary_cross_entropy_with_logits(z, y, reduction='none')).mean()

@pytest.mark.parametrize('loss', [nn.BCEWithLogitsLoss(), BCEWithLogitsLossFlat(), BCEWithLogitsLossFlat(pos_weight=torch.tensor([1.,2,3]).to(default_device())),
                                  partial(F.binary_cross_entropy_with_logits, reduction='mean'), Mine(), Wrapped(nn.BCEWithLogitsLoss()), Method().loss,
                                  around(nn.BCEWithLogitsLoss()), own_bce, smoothed, focal, nn.MultiLabelSoftMarginLoss(), timm.loss.BinaryCrossEntropy(smoothing=0.),
                                  timm.loss.AsymmetricLossMultiLabel()], ids=_loss_name)
def test_several_labels_get_binary_kd(loss):
    assert chosen(learner(LABELS, loss), conv(3))==dict(binarykd=(BinaryKD,.9), task=.1)

@pytest.mark.parametrize('y', [LABELS.long(), LABELS.bool()])
def test_labels_as_whole_numbers(y):
    assert 'binarykd' in chosen(learner(y, BCEWithLogitsLossFlat(), mlp(3)), conv(3))
    assert 'binarykd' in chosen(learner(y, lambda z,y: own_bce(z, y.float()), mlp(3)), conv(3))

@pytest.mark.parametrize('y', [Y%2, (Y%2)[:,None], (Y%2).float(), (Y%2)[:,None].float()])
def test_one_label(y):
    def own(z, y): return own_bce(z.flatten(), y.flatten().float())
    for loss in (BCEWithLogitsLossFlat(), own): assert 'binarykd' in chosen(learner(y, loss, mlp(1)), conv(1))

def root(z, y): return ((z-y)**2).mean().sqrt()
def log_cosh(z, y): return torch.log(torch.cosh(z-y)).mean()
@pytest.mark.parametrize('loss', [MSELossFlat(), nn.MSELoss(), L1LossFlat(), nn.SmoothL1Loss(), nn.HuberLoss(), F.mse_loss, Wrapped(F.l1_loss), root, log_cosh], ids=_loss_name)
def test_numbers_get_the_distance_of_outputs(loss):
    assert chosen(learner(NUMBERS, loss), conv(3))==dict(logitsmse=(LogitsMSE,.9), task=.1)

@pytest.mark.parametrize('y,c', [(NUMBERS[:,0],1), (NUMBERS[:,:1],1), (NUMBERS.repeat(1,4).view(-1,6,2),12), (Y,1)], ids=['vector','column','points','counts'])
def test_any_number_of_outputs(y, c):
    for loss in (MSELossFlat(), lambda z,y: (z.flatten()-y.flatten()).abs().mean()): assert 'logitsmse' in chosen(learner(y, loss, mlp(c)), conv(c))

def own_ce(z, y): return (1-F.softmax(z, 1).gather(1, y[:,None])).mean()
@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), nn.CrossEntropyLoss(), LabelSmoothingCrossEntropyFlat(), FocalLossFlat(), nn.MultiMarginLoss(), own_ce,
                                  partial(F.cross_entropy, label_smoothing=.1), timm.loss.LabelSmoothingCrossEntropy(), Wrapped(own_ce)], ids=_loss_name)
def test_classes_get_softmax_kd(loss): assert chosen(learner(Y, loss), conv(10))==dict(kd=(KD,.9), task=.1)

def test_soft_labels_and_pixels_are_classes():
    soft = F.one_hot(Y, 10)*.9+.01
    for loss in (nn.CrossEntropyLoss(), timm.loss.SoftTargetCrossEntropy()): assert 'kd' in chosen(learner(soft, loss), conv(10))
    net = lambda: here(nn.Conv2d(1, 3, 3, padding=1))
    for loss in (CrossEntropyLossFlat(axis=1), nn.CrossEntropyLoss(), lambda z,y: F.cross_entropy(z, y)):
        learn = learner((IMAGES[:,0]*2.9).long(), loss, net())
        assert 'kd' in chosen(learn, net())
    assert 'binarykd' in chosen(learner((IMAGES>.5).float(), nn.BCEWithLogitsLoss(), here(nn.Conv2d(1, 1, 3, padding=1))), here(nn.Conv2d(1, 1, 3, padding=1)))

def test_log_probabilities_of_a_student():
    assert 'kd' in chosen(learner(Y, nn.NLLLoss(), nn.Sequential(mlp(10), nn.LogSoftmax(1))), conv(10))

@pytest.mark.parametrize('y,loss', [(NUMBERS, lambda z,y: (1-F.cosine_similarity(z, y)).mean()), (NUMBERS.abs(), nn.PoissonNLLLoss()),
                                    (LABELS*.5+.2, own_bce), (LABELS, lambda z,y: -(y*z.log_softmax(1)).mean())])
def test_what_is_not_certain_is_refused(y, loss):
    learn = learner(y, loss)
    names = learn.cbs.attrgot('name')
    with pytest.raises(ValueError, match='is not certain.*KD.*BinaryKD.*LogitsMSE'): quiet(learn, conv(3), 1, fit='distill')
    assert learn.cbs.attrgot('name')==names
    quiet(learn, conv(3), 1, LogitsMSE(), fit='distill')

def test_probabilities_of_labels_have_no_temperature():
    learn = learner(LABELS, BCELossFlat(), nn.Sequential(mlp(3), nn.Sigmoid()))
    with pytest.raises(ValueError, match='BCEWithLogitsLossFlat'): quiet(learn, conv(3), 1, fit='distill')

def test_the_choice_is_the_named_terms_bit_for_bit():
    for y,loss,term in ((LABELS, nn.BCEWithLogitsLoss(), BinaryKD()*.9), (NUMBERS, nn.MSELoss(), LogitsMSE()*.9), (NUMBERS, root, LogitsMSE()*.9), (Y, own_ce, KD(T=4)*.9)):
        c = y[0].numel() if y.is_floating_point() else 10
        a,b = (quiet(learner(y, loss), 2, 1e-2, cbs=cb) for cb in (KnowledgeDistillation(conv(c)), KnowledgeDistillation(conv(c), term, task=.1)))
        assert torch.equal(flat(a.model), flat(b.model))

def test_the_choice_follows_the_learner():
    kd = KnowledgeDistillation(conv(3))
    learn = learner(LABELS, nn.BCEWithLogitsLoss(), cbs=kd)
    assert list(kd.terms)==['binarykd'] and kd.task==.1
    quiet(learn, 1, 1e-3)
    learn.loss_func = nn.MSELoss()
    quiet(learn, 1, 1e-3)
    assert learn.recorder.metric_names[-1]=='logitsmse'
    learn.loss_func = lambda z,y: (1-F.cosine_similarity(z, y)).mean()
    with learn.no_bar(),learn.no_logging():
        learn.validate(); learn.get_preds()                 # what does not train does not mind
        with pytest.raises(ValueError, match='not certain'): learn.fit(1)
    learn.loss_func = BCEWithLogitsLossFlat()
    quiet(learn, 1, 1e-3)
    assert learn.recorder.metric_names[-1]=='binarykd'
    with learn.no_bar(): learn.lr_find(num_it=3, show_plot=False)

def test_a_task_weight_beside_the_choice():
    assert chosen(learner(LABELS, nn.BCEWithLogitsLoss()), conv(3), task=.7)['task']==.7

def test_labels_taught_are_no_worse_than_labels_alone():
    "On images that neither has seen; softmax over the labels makes it worse"
    dls = image_dls('digits')
    def labels(y): return torch.stack([y%2==0, y>=5, torch.isin(y, torch.tensor([2,3,5,7], device=y.device)), y%3==0], 1).float()
    def items(ds, n): return list(zip(ds.x[:n].float()/255, labels(ds.y[:n])))
    def learn(n, model, cb=None):
        loader = lambda ds,n: DataLoader(items(ds, n), bs=64, shuffle=n is not None)
        d = DataLoaders(loader(dls.train.dataset, n), loader(dls.test.dataset, None), device=default_device())
        set_seed(0); d.train.rng = random.Random(0)
        return quiet(Learner(d, model, loss_func=nn.BCEWithLogitsLoss()), 10, 1e-2, cbs=cb)
    def right(learn): z,y = learn.get_preds(act=noop); return ((z>0)==y.bool()).float().mean().item()
    teacher = learn(1000, conv(4)).model
    alone,taught,softmax = (right(learn(300, mlp(4), cb)) for cb in (None, KnowledgeDistillation(teacher), KnowledgeDistillation(teacher, Softmax()*.9, .1)))
    assert taught>=alone-.005 and softmax<taught-.02

class Softmax(LogitTerm, abstract=True):
    "What several labels got from `distill`"
    def __call__(self, o): return kd(o.z_s, o.z_t, T=4)

def test_mixed_images_of_several_labels():
    "Labels of .3 are labels"
    assert 'binarykd' in (quiet(learn := learner(LABELS, BCEWithLogitsLossFlat()), conv(3), 1, fit='distill', cbs=MixUp()) and learn.recorder.metric_names)

@pytest.mark.parametrize('term', [KD(), KD(standardize=True), DIST(), LwF()])
def test_softmax_terms_refuse_targets_that_are_no_classes(term):
    for y,loss in ((LABELS, nn.BCEWithLogitsLoss()), (LABELS.long(), BCEWithLogitsLossFlat()), (NUMBERS, nn.MSELoss()), (NUMBERS.view(-1,3,1), MSELossFlat())):
        with pytest.raises(ValueError, match=f'{type(term).__name__} compares probabilities of classes.*BinaryKD.*LogitsMSE'):
            quiet(learner(y, loss, mlp(3)), conv(3), 1, term, fit='distill')
        learn = learner(y, loss, mlp(3))
        quiet(learn, conv(3), 1, term*0 + LogitsMSE(), fit='distill')
    quiet(learner(F.one_hot(Y, 10).float(), nn.BCEWithLogitsLoss()), conv(10), 1, term, fit='distill')       # labels of which one is right

def test_dkd_names_what_it_needs():
    for y in (LABELS, F.one_hot(Y, 10).float()):
        c = y.shape[1]
        with pytest.raises(ValueError, match='DKD needs the number of the right class'): quiet(learner(y, nn.BCEWithLogitsLoss()), conv(c), 1, DKD(), fit='distill')

def test_an_old_head_beside_another_task():
    "LwF on a head of its own compares nothing with the targets"
    quiet(learner(NUMBERS, nn.MSELoss()), conv(3), 1, LwF('2'), fit='distill')


@pytest.mark.parametrize('recipe', [vbgs_kd, prune_then_distill, prue, distill_then_prune, vid], ids=lambda f: f.__name__)
def test_recipes_train_classifiers(recipe, tmp_path):
    for y in (LABELS, NUMBERS):
        dls = foreign(y)
        dls.c = 3
        with pytest.raises(ValueError, match='targets are torch.float32 .* one class number for each sample'): recipe(dls, path=tmp_path/'run', quick=True, show=False)
        assert not (tmp_path/'run').exists()


NAMES = 'zero one two three four five six seven eight nine'.split()
OTHER = sorted(NAMES)
PLACE = torch.tensor([OTHER.index(n) for n in NAMES], device=Y.device)

def named(vocab=NAMES, **kwargs):
    y = Y if vocab is NAMES else PLACE.to(Y.device)[Y]
    return from_arrays(X, y, vocab=vocab, stats=([.3],[.37]), **kwargs)
def net(seed=2): set_seed(seed); return here(create('lenet5_caffe', data()))
def few():
    "Images of four classes, in an order of their own"
    names = ['seven','two','zero','nine']
    some = torch.isin(Y, torch.tensor([NAMES.index(n) for n in names], device=Y.device))
    to = torch.tensor([names.index(n) if n in names else -1 for n in NAMES], device=Y.device)
    return from_arrays(X[some], to[Y[some]], vocab=names, bs=16, stats=([.3],[.37]))
def in_order(teacher, dls):
    "The network with its last layer in the order of the classes of `dls`"
    new,order = deepcopy(teacher),[OTHER.index(n) for n in dls.vocab]
    for k,p in new.fc2.named_parameters(): setattr(new.fc2, k, nn.Parameter(p.detach()[order].clone()))
    return new

BY_CLASS = dict(kd=KD(T=4)*.9, standardized=KD(standardize=True), dkd=DKD(), dist=DIST(), lwf=LwF(), logitsmse=LogitsMSE(), binarykd=BinaryKD(), simkd=SimKD('conv2'),
                srrl=KD()+SRRL('conv2'), default=None)
@pytest.mark.parametrize('name', BY_CLASS)
@pytest.mark.parametrize('cache', [False,True])
@pytest.mark.parametrize('dls', [named, few], ids=['order','subset'])
def test_classes_are_matched_by_name(name, cache, dls, capsys):
    "As with a teacher whose last layer stands in the student's order"
    teacher,res = Learner(named(OTHER), net()),[]
    student = lambda dls: (set_seed(1), create('lenet5', dls))[1]
    for t in (teacher, in_order(teacher.model, dls())):
        d = dls(); learn = seeded(d, student(d))
        quiet(learn, 2, 1e-3, cbs=KnowledgeDistillation(t, BY_CLASS[name], cache=cache))
        res.append(flat(learn.model))
        said = [o for o in capsys.readouterr().out.splitlines() if o.strip()]
        assert [('by name' in o) for o in said]==[True][:len(res)==1], said
    if 'srrl' in name and dls is few: return            # the whole of the teacher's last layer judges, not the part
    assert (res[0]-res[1]).abs().mean()<1e-5       # a product over four outputs rounds otherwise than one over ten

@pytest.mark.parametrize('dls', [named, few], ids=['order','subset'])
def test_simkd_answers_in_the_student_s_order(dls, tmp_path):
    teacher,d = Learner(named(OTHER), net()),dls()
    learn = seeded(d, create('lenet5', d))
    quiet(learn, teacher, 1, SimKD('conv2'), fit='distill')
    order = [OTHER.index(n) for n in d.vocab]
    assert torch.equal(learn.model.head.fc2.weight, teacher.model.fc2.weight[order]) and learn.model.head.fc2.out_features==len(d.vocab)
    assert {type(m).__module__.partition('.')[0] for m in learn.model.modules()}=={'torch'}
    again = create(learn.model.arch['name'], **learn.model.arch['kwargs']).to(default_device())
    again.load_state_dict(learn.model.state_dict())
    x = d.valid.one_batch()[0]
    assert torch.equal(again.eval()(x), learn.model.eval()(x))

def test_simkd_refuses_what_it_cannot_reorder():
    teacher = Learner(named(OTHER), nn.Sequential(net(), nn.BatchNorm1d(10)).to(default_device()))
    with pytest.raises(ValueError, match='does not end in a linear layer'): quiet(seeded(named(), create('lenet5', named())), teacher, 1, SimKD({'conv2': '0.conv2'}), fit='distill')

def test_one_output_whose_yes_is_the_others_no():
    def dls(vocab):
        d = from_arrays(X, Y%2, vocab=vocab)
        for dl in d.loaders: dl.dataset.loss_func = BCEWithLogitsLossFlat()
        return d
    learn = seeded(d := dls(['cat','dog']), mlp(1))
    learn.loss_func = BCEWithLogitsLossFlat()
    quiet(learn, Learner(dls(['cat','dog']), conv(1)), 1, fit='distill')
    with pytest.raises(ValueError, match="yes is 'cat' for the teacher, 'dog' for the student"): quiet(learn, Learner(dls(['dog','cat']), conv(1)), 1, fit='distill')

def test_features_do_not_mind_other_classes(capsys):
    animals = from_arrays(X, Y%4, vocab=['ant','bee','cat','dog'])
    for term in (AT('conv2'), VIDLP('fc2'), LwF('fc3'), SRRL('conv2')):
        quiet(seeded(animals, create('lenet5', animals)), Learner(named(), net()), 1, term, fit='distill')
    assert 'class' not in capsys.readouterr().out
    with pytest.raises(ValueError, match="does not know 4 of the student's 4 classes, 'ant', 'bee', 'cat', 'dog'; it knows 'zero'"):
        quiet(seeded(animals, create('lenet5', animals)), Learner(named(), net()), 1, KD(), fit='distill')

def test_plain_numbers_are_no_names(capsys):
    learn = seeded(data(), create('lenet5', data()))
    quiet(learn, Learner(named(), net()), 1, fit='distill')
    assert 'plain numbers' in capsys.readouterr().out
    quiet(seeded(data(), create('lenet5', data())), Learner(data(), net()), 1, fit='distill')
    assert not capsys.readouterr().out.strip()

def test_the_same_classes_are_not_spoken_of(capsys):
    d = named()
    for source in (d, named()): quiet(seeded(d, create('lenet5', d)), Learner(source, net()), 1, fit='distill')
    quiet(seeded(named(), create('lenet5', d)), net(), 1, fit='distill')      # a module: nothing is known
    assert not capsys.readouterr().out.strip()

@pytest.mark.parametrize('vocab,c,names', [
    (['a','b'], 2, ['a','b']), (CategoryMap(['b','a']), 2, ['a','b']), (L(['the','of','cat'],CategoryMap(['neg','pos'])), 2, ['neg','pos']),
    ((['the','of','cat'],['neg','pos']), 2, ['neg','pos']), (np.array(['sky','road']), 2, ['sky','road']), (L('a','b'), 2, ['a','b']), (None, 2, None),
    (['a','b'], 3, None), ([3,5], 2, ['3','5']), ([CategoryMap(['x','y']),CategoryMap(['u','v','w'])], 2, ['x','y']), ('ab', 2, None), ([], 0, None)])
def test_which_vocab_names_the_outputs(vocab, c, names): assert (class_names(SimpleNamespace(vocab=vocab), c) or None)==names

def test_several_categories_of_fastai(capsys):
    "Labels as fastai's own blocks name them, in the order of their vocab"
    x = IMAGES.cpu().repeat(1,3,1,1)
    def dls(vocab):
        names = [[n for n,on in zip(('even','large','prime'), o) if on] for o in LABELS.cpu()]
        block = DataBlock((TransformBlock(type_tfms=lambda i: TensorImage(x[i])), MultiCategoryBlock(vocab=vocab)), get_items=lambda _: range(len(x)),
                          get_y=lambda i: names[i], splitter=RandomSplitter(.2, seed=0))
        return block.dataloaders(None, bs=32, num_workers=0, device=default_device())
    a,b = dls(['even','large','prime']),dls(['prime','even','large'])
    model = lambda seed: (set_seed(seed), nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))[1].to(default_device())
    res,t = [],Learner(b, model(2))
    for teacher in (t, nn.Sequential(nn.Flatten(), l := nn.Linear(192, 3)).to(default_device())):
        if teacher is not t:
            with torch.no_grad(): l.weight.copy_(t.model[1].weight[[1,2,0]]); l.bias.copy_(t.model[1].bias[[1,2,0]])
        a.train.rng = random.Random(0); set_seed(0)
        learn = Learner(a, model(1)); kd = KnowledgeDistillation(teacher)
        quiet(learn, 1, 1e-2, cbs=kd)
        assert list(kd.terms)==['binarykd']
        res.append(flat(learn.model))
    assert torch.allclose(*res, atol=1e-6) and capsys.readouterr().out.count('by name')==1

def test_a_picture_shows_classes_by_name():
    learn,teacher = seeded(named(), net()),Learner(named(OTHER), net())
    teacher.model = in_order(net(), SimpleNamespace(vocab=NAMES))        # says the same, in another order
    teacher.model.load_state_dict(net().state_dict())
    axs = learn.show_distilled(teacher, n=2)
    with torch.no_grad():
        x = learn.dls.valid.one_batch()[0]
        order = [OTHER.index(n) for n in NAMES]
        p_t,p_s = teacher.model.eval()(x).softmax(1)[:,order],learn.model.eval()(x).softmax(1)
        i = (p_t-p_s).abs().sum(1).argmax()
        best = (p_t[i]+p_s[i]).topk(3).indices
    widths = [b.get_width() for b in axs[1,0].patches[:3]]
    assert np.allclose(widths, p_t[i][best].cpu(), atol=1e-5)


class Last(nn.Module):
    def __init__(self, net, f): super().__init__(); self.net,self.f = net,f
    def forward(self, x): return self.f(self.net(x))

@pytest.mark.parametrize('term', [KD(T=4)*.9, KD(standardize=True), DKD(), DIST(), LwF(), LwF('2'), None])
@pytest.mark.parametrize('f', [partial(torch.softmax, dim=1), partial(torch.log_softmax, dim=1)], ids=['p','log p'])
def test_probabilities_teach_what_logits_do(term, f, capsys):
    res = []
    for t in (Last(conv(10), f), conv(10)):
        res.append(flat(quiet(learner(Y, nn.CrossEntropyLoss()), 2, 1e-2, cbs=KnowledgeDistillation(t, term)).model))
        assert ('probabilities' in (said := capsys.readouterr().out))==(len(res)==1) and said.count('The teacher')==(len(res)==1)
    assert torch.allclose(*res, atol=1e-4)

def test_probabilities_in_the_cache_and_in_another_order():
    res = []
    for t in (Learner(named(OTHER), Last(net(), partial(torch.softmax, dim=1)).to(default_device())), in_order(net(), named())):
        set_seed(1); learn = seeded(named(), create('lenet5', named()))
        res.append(flat(quiet(learn, 2, 1e-3, cbs=KnowledgeDistillation(t, cache=True)).model))
    assert torch.allclose(*res, atol=1e-4)

@pytest.mark.parametrize('z', [torch.zeros(8,4), torch.zeros(8,4)-1., torch.randn(8,4), torch.eye(4)*9, torch.ones(8,1), torch.rand(8,4), torch.full((8,3), 1/3.)*2,
                               torch.zeros(8,2,5,5), -torch.rand(8,4)], ids=range(9))
def test_logits_are_not_taken_for_probabilities(z): assert probabilities_in(z) is None

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('shape', [(8,10), (8,1000), (2,3,4,4), (2,6,5), (1,2)])
def test_probabilities_are_noticed(dtype, shape):
    z = torch.randn(shape)*3
    d = 1 if len(shape)==4 else -1
    assert probabilities_in(z.softmax(d).to(dtype))=='probabilities' and probabilities_in(z.log_softmax(d).to(dtype))=='log-probabilities'
    assert probabilities_in(F.one_hot(torch.zeros(8).long(), 4).to(dtype))=='probabilities'      # sure of one class
    assert log_of(torch.tensor([0.,1.], dtype=dtype)).isfinite().all()

def test_features_and_numbers_do_not_mind_probabilities(capsys):
    shares = NUMBERS.softmax(1)
    quiet(learner(Y, nn.CrossEntropyLoss(), nn.Sequential(*conv(10))), Last(conv(10), partial(torch.softmax, dim=1)), 1, SP({'1': 'net.1'}), fit='distill')
    learn = learner(shares, nn.MSELoss())
    quiet(learn, Last(conv(3), partial(torch.softmax, dim=1)), 1, fit='distill')     # shares are numbers
    assert not capsys.readouterr().out.strip() and learn.recorder.metric_names[-1]=='logitsmse'

def test_a_student_in_probabilities_is_refused():
    with pytest.raises(ValueError, match='student answers in probabilities'):
        quiet(learner(Y, nn.CrossEntropyLoss(), nn.Sequential(mlp(10), nn.Softmax(1))), conv(10), 1, fit='distill')

def test_sigmoids_are_warned_of():
    with pytest.warns(UserWarning, match='as if it ended in a sigmoid'): quiet(learner(LABELS, nn.BCEWithLogitsLoss()), Last(conv(3), torch.sigmoid), 1, fit='distill')


class Sees(nn.Module):
    "Remembers what it is given"
    def __init__(self, net): super().__init__(); self.net,self.seen = net,[]
    def forward(self, x): self.seen.append(x.detach().clone()); return self.net(x)

def stats(mean, std, **kwargs): return data(stats=([mean],[std]), **kwargs)
def hooks(model): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in model.modules())

@pytest.mark.parametrize('kw', [{}, dict(cache=True), dict(cbs=[MixUp()]), dict(cbs=[CPUAutocast()]), dict(cache=True, n_views=2)], ids=['plain','cache','mixup','bf16','views'])
@pytest.mark.parametrize('term', [KD()*.9, AT({'conv1': 'net.conv1'}) + VID({'conv2': 'net.conv2'})], ids=['answers','features'])
def test_the_teacher_gets_its_own_normalisation(kw, term, capsys):
    "Every pixel is what the teacher's own loaders make of it: the same as with a teacher that does it itself"
    class Itself(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): return self.net((x*.3+.2-.5)/.25)
    res,pad = [],1 if 'n_views' in kw else 0
    for t in (Learner(stats(.5, .25), nn.Sequential(OrderedDict(net=net()))), here(Itself(net()))):
        kw = dict(kw, cbs=[type(c)() for c in kw.get('cbs', [])])
        d = stats(.2, .3, pad=pad); set_seed(1); learn = seeded(d, create('lenet5', d))
        before = state(learn.model) if not res else before
        learn.model.load_state_dict(before)
        quiet(learn, t, 2, term, fit='distill', **kw)
        res.append(flat(learn.model))
        assert ('own normalisation' in capsys.readouterr().out)==(len(res)==1)
        assert not hooks(t.model if isinstance(t, Learner) else t)
    assert torch.allclose(*res, atol=1e-2 if any(isinstance(c, CPUAutocast) for c in kw['cbs']) else 2e-4)

@pytest.mark.parametrize('ours,theirs', [(None,(.5,.25)), ((.5,.25),None), ((.1,.2),(.1,.2)), (None,None)])
def test_pixels_are_those_of_the_teacher_s_loaders(ours, theirs):
    def dls(o):
        d = stats(*(o or (0.,1.)))
        if o is None:
            for dl in d.loaders: dl.after_batch = Pipeline([t for t in dl.after_batch if not isinstance(t, Normalize)])
        return d
    teacher = Learner(dls(theirs), here(Sees(net())))
    learn = seeded(d := dls(ours), create('lenet5', d))
    quiet(learn, teacher, 1, fit='distill')
    seen = torch.cat(teacher.model.seen)
    mean,std = theirs or (0.,1.)
    back = ((seen*std+mean)*255)
    assert (back-back.round()).abs().max()<2e-2 and -.1<back.min() and 250<back.max()<255.1        # bytes again
    assert torch.allclose(seen.min(), torch.tensor((0-mean)/std, device=seen.device), atol=1e-4)

def test_nothing_is_done_to_what_is_not_known(capsys):
    "A bare network, and loaders that do not say how they normalise"
    d = stats(.2, .3)
    teacher = here(Sees(net()))
    for t in (teacher, Learner(foreign(Y), teacher, loss_func=nn.CrossEntropyLoss())):
        quiet(seeded(d, create('lenet5', d)), t, 1, fit='distill')
        assert torch.allclose(torch.cat(teacher.seen).min(), torch.tensor(-.2/.3, device=X.device), atol=1e-4)
    assert 'own' not in capsys.readouterr().out

def test_other_scales_are_refused():
    bytes_ = from_arrays(X.float(), Y)
    with pytest.raises(ValueError, match='on other scales.*teacher_tfm='): quiet(seeded(data(), create('lenet5', data())), Learner(bytes_, net()), 1, fit='distill')

def test_weight_0_and_another_normalisation():
    plain = flat(quiet(seeded(stats(.2, .3), mlp(10)), 2, 1e-3).model)
    for cache in (False,True):
        cb = KnowledgeDistillation(Learner(stats(.5, .25), net()), KD()*0 + AT({'1': 'conv1'})*0, task=1, cache=cache)
        assert torch.equal(flat(quiet(seeded(stats(.2, .3), mlp(10)), 2, 1e-3, cbs=cb).model), plain)

def large(**kwargs): return from_arrays(F.interpolate(X.float(), size=16).byte(), Y, **kwargs)
def conv_net(): set_seed(2); return here(create('lenet5_caffe', large()))
def grow(x): return F.interpolate(x, size=16)

def test_images_of_another_size():
    s = lambda: seeded(data(), create('lenet5', data()))
    teacher = Learner(large(), conv_net())
    with pytest.raises(ValueError, match=r'trained on images of 1 × 16 × 16 and cannot read these of 1 × 8 × 8. Pass teacher_tfm='): quiet(s(), teacher, 1, fit='distill')
    for kw in ({}, dict(cache=True), dict(terms=KD()+VID({'conv2': 'conv2'})), dict(terms=SimKD({'conv1': 'conv2'}))): quiet(s(), teacher, 1, fit='distill', teacher_tfm=grow, **kw)
    assert not hooks(teacher.model)

def test_any_size_is_said(capsys):
    any_size = nn.Sequential(nn.Conv2d(1,8,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10)).to(default_device())
    learn = seeded(data(), create('lenet5', data()))
    for _ in range(2): quiet(learn, Learner(large(), any_size), 1, fit='distill')
    assert capsys.readouterr().out.count('reads these of 1 × 8 × 8 as they are')==2
    kd = KnowledgeDistillation(Learner(large(), any_size))
    for _ in range(2): quiet(learn, 1, cbs=kd)
    assert capsys.readouterr().out.count('as they are')==1
    quiet(learn, Learner(large(), any_size), 1, fit='distill', teacher_tfm=grow)
    assert 'as they are' not in capsys.readouterr().out

def test_a_transform_for_a_bare_network():
    "It sees what the student sees, and the teacher what it makes of it, wherever it is called from"
    seen,teacher = [],here(Sees(conv_net()))
    def tfm(x): seen.append(x.clone()); return grow(x)
    learn = seeded(data(), create('lenet5', data()))
    kd = learn.distill(teacher, 1, KD() + VID({'conv2': 'net.conv2'}), teacher_tfm=tfm)
    assert {o.shape[-1] for o in teacher.seen}=={16} and {o.shape[-1] for o in seen}=={8}
    plot_log_likelihood(kd, learn, n=1)
    assert not hooks(teacher)

def test_transforms_that_are_none():
    learn = seeded(data(), create('lenet5', data()))
    for tfm,said in ((16, 'teacher_tfm is 16, expected a function'), (lambda x: None, 'teacher_tfm gives None'), (lambda x: x.cpu().numpy(), 'gives ndarray')):
        with pytest.raises(ValueError, match=said): quiet(learn, conv_net(), 1, fit='distill', teacher_tfm=tfm)

@pytest.mark.long
def test_a_compiled_teacher_is_fed_and_left_as_it_was():
    compiled = torch.compile(conv_net(), backend='eager')
    x = torch.randn(2,1,16,16, device=X.device)
    with torch.no_grad(): compiled.eval()(x)
    quiet(seeded(data(), create('lenet5', data())), compiled, 1, KD() + VID({'conv2': 'conv2'}), fit='distill', teacher_tfm=grow)
    with torch.no_grad(): assert torch.allclose(compiled.eval()(x), compiled._orig_mod(x), atol=1e-5) and not hooks(compiled)

def test_an_exported_teacher(tmp_path, capsys):
    teacher = Learner(stats(.5, .25), net(), path=tmp_path)
    teacher.export('teacher.pkl')
    back,d = load_learner(tmp_path/'teacher.pkl', cpu=default_device().type=='cpu'),stats(.2, .3)
    quiet(seeded(d, create('lenet5', d)), back, 1, fit='distill')
    assert 'own normalisation' in capsys.readouterr().out

def test_the_learner_s_file_carries_nothing_of_the_teacher(tmp_path):
    d = stats(.2, .3)
    learn = seeded(d, create('lenet5', d), path=tmp_path, cbs=KnowledgeDistillation(Learner(stats(.5, .25), net()), teacher_tfm=lambda x: x))
    quiet(learn, 1, 1e-3)
    learn.export('model.pkl')
    assert (tmp_path/'model.pkl').stat().st_size < 4*n_params(learn.model)+200_000
    assert len(load_learner(tmp_path/'model.pkl').predict(d.valid.dataset[0][0])[2])==10


@pytest.fixture
def own():
    "Names that a test brings are gone after it"
    kept,weights = dict(registry._terms),dict(usual_weights)
    yield
    registry._terms.clear(); registry._terms.update(kept)
    for k,v in weights.items(): kept[k].usual = v

BLANK = torch.zeros(2,1,8,8)
def pair(): return create('lenet5', data()).cpu(),net().cpu()

def test_a_term_of_ones_own_has_a_name(own):
    class Cosine(LogitTerm):
        def __call__(self, o): return (1-F.cosine_similarity(o.z_s, o.z_t)).mean()
    class Stages(HeadTerm):
        usual,aliases = 7.,('My-Stages',)
        def head(self, f_s, f_t): return nn.Conv2d(f_s.shape[1], f_t.shape[1], 1)
        def compare(self, head, f_s, f_t): return F.l1_loss(head(f_s), f_t)
    class Deep(LayerTerm):
        def __init__(self, layer, teacher_layer=None, p=1): super().__init__(layer, teacher_layer); self.p = p
        @classmethod
        def usual_layers(cls, student, teacher, data, layers=None): return last_map(student, data),last_map(teacher, data)
        def compare(self, f_s, f_t): return (f_s.mean()-f_t.mean()).abs()**self.p
    usual_weights['Cosine'] = 3.
    assert method_names('kd + COSINE + my-stages + Deep')==['KD','Cosine','Stages','Deep'] and usual_weights['Stages']==7
    terms = named_term('KD + Cosine + Stages + Deep', *pair(), BLANK, options=dict(Deep=dict(p=2)), weights=dict(Deep=4.)).terms
    assert [t.weight for t in terms]==[.9,3.,7.,4.] and terms[3].p==2
    assert terms[2].pairs==named_term('AT', *pair(), BLANK).terms[0].pairs and terms[3].pairs==[('pool2','pool2')]
    quiet(seeded(data(), create('lenet5', data())), net(), 1, named_term('Cosine + Stages', create('lenet5', data()), net(), data()), fit='distill')

def test_a_subclass_of_a_term_and_a_second_try(own):
    class Strong(VID): pass
    assert usual_weights['Strong']==10 and method_names('vid-i')==['VID']
    class Strong(VID): usual = 5.
    assert named_term('Strong', *pair(), BLANK).terms[0].weight==5 and isinstance(named_term('strong', *pair(), BLANK).terms[0], Strong)

def test_names_of_the_package_stay_its_own(own):
    class KD(LogitTerm):
        usual = 55.
    assert usual_weights['KD']==.9 and type(named_term('KD', *pair(), BLANK).terms[0]) is kdnb.all.KD

def test_what_a_name_cannot_build(own):
    with pytest.raises(ValueError, match="there is no term 'Ghost'. Write it as a class Ghost"): usual_weights['Ghost'] = 1.
    with pytest.raises(ValueError, match='no method is called'): named_term('Ghost', *pair(), BLANK)
    class Needy(LogitTerm):
        def __init__(self, strength): self.strength = strength
    with pytest.raises(ValueError, match='Needy cannot be built by its name'): named_term('Needy', *pair(), BLANK)
    assert named_term('Needy', *pair(), BLANK, options=dict(Needy=dict(strength=2))).terms[0].strength==2
    with pytest.raises(ValueError, match="Did you mean 'Needy'"): method_names('Needi')

def test_the_table_is_what_the_classes_say(own):
    class Cosine(LogitTerm):
        usual = 2.
        def __call__(self, o): return (1-F.cosine_similarity(o.z_s, o.z_t)).mean()
    assert usual_weights['Cosine']==2 and len(usual_weights)==len(registry._terms) and 'Cosine' in repr(usual_weights)
    Cosine.usual = 4.
    assert usual_weights['Cosine']==named_term('cosine', *pair(), BLANK).terms[0].weight==4
    usual_weights['Cosine'] = 5.
    assert Cosine.usual==named_term('cosine', *pair(), BLANK).terms[0].weight==5
    with pytest.raises(ValueError, match='weight is -1'): usual_weights['Cosine'] = -1

def test_the_table_is_as_it_was():
    assert {k: usual_weights[k] for k in vars(kdnb.all) if k in usual_weights}==dict(
        KD=.9, BinaryKD=.9, LogitsMSE=1., DKD=1., DIST=1., LwF=1., DistillToken=.5, AT=1000., NST=50., SP=3000., PKT=30000., RKD=1.,
        FSP=50., FitNet=100., VID=10., VIDLP=10., CRD=.8, SRRL=1., SemCKD=400., SimKD=1., ReviewKD=1., CC=100., ICKD=2.5)
    assert method_names('vid-lp + Similarity + logits')==['VIDLP','SP','LogitsMSE']


class Said(nn.Module):
    "Returns a dict"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return dict(hidden=x.flatten(1)*2, logits=self.net(x))

def test_networks_that_return_a_dict(capsys):
    "The task, the order of the classes and probabilities are those of the logits in it"
    res = []
    for t in (Learner(named(OTHER), here(Said(Last(net(), partial(torch.softmax, dim=1))))), in_order(net(), named())):
        set_seed(1); learn = seeded(named(), here(Said(create('lenet5', named()))))
        learn.loss_func = lambda out,y: own_ce(out['logits'], y)
        learn.metrics = []
        res.append(flat(quiet(learn, 2, 1e-3, cbs=KnowledgeDistillation(t, KD(T=4)*.9, task=.1)).model))
    assert torch.allclose(*res, atol=1e-4)
    said = capsys.readouterr().out
    assert said.count('by name')==1 and said.count('probabilities')==1

@pytest.mark.parametrize('loss,c,name', [(nn.BCEWithLogitsLoss(), 3, 'binarykd'), (nn.MSELoss(), 3, 'logitsmse'), (nn.CrossEntropyLoss(), 10, 'kd')])
def test_images_without_targets(loss, c, name):
    "What the loss function asks is known without them"
    items = [(x,) for x in IMAGES]
    dls = DataLoaders(DataLoader(items, bs=67), DataLoader(items, bs=67), device=default_device())
    dls.n_inp = 1
    learn = Learner(dls, mlp(c), loss_func=loss)
    before = flat(learn.model).clone()
    quiet(learn, conv(c), 1, fit='distill')
    assert name in learn.recorder.metric_names and not torch.equal(flat(learn.model), before)
