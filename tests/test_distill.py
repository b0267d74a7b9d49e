"Every distillation term in every kind of training: exact, clean afterwards, equal on two processes, and refused with a sentence where it cannot work."
import warnings
from collections import OrderedDict, namedtuple
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import timm
from fastai.callback.schedule import *
from fastai.vision.models.xresnet import XResNet
from torchvision.models import MobileNetV2, resnet18
from torchvision.models.resnet import BasicBlock, ResNet
import two_processes as ddp
from common import CPUAutocast, StopAt, X, Y, data, ends, flat, here, quiet, seeded
from kdnb.all import *
from kdnb.files import load_state
from kdnb.features.logits import as_logits
from kdnb.training.optimizer import param_states

DLS = data()

TERMS = dict(kd=KD(), standardized=KD(T=2, standardize=True)*9, logitsmse=LogitsMSE(), dkd=DKD(), dist=DIST(), lwf=LwF(), old_head=LwF('fc3'),
             at=AT(['conv1','conv2'])*100, at_norm=AT('conv2', squared=False), nst=NST('conv2')*50, sp=SP('conv2')*100, pkt=PKT({'fc2': 'fc1'})*1000,
             rkd=RKD({'fc2': 'fc1'}), fsp=FSP(['conv1','conv2']), fitnet=FitNet(['conv1','conv2'])*10, fitnet_mlp=FitNet({'fc1': 'conv2'}),
             vid=VID(['conv1','conv2']), vid_sizes=VID({'conv1': 'conv2'}), vid_mlp=VID({'fc1': 'conv2'}), vidlp=VIDLP('fc2'),
             crd=CRD({'fc2': 'fc1'}), crd_few=CRD({'fc2': 'fc1'}, K=20), srrl=SRRL('conv2'), semckd=SemCKD(['conv1','conv2'], ['conv1','conv2','fc1']),
             simkd=SimKD('conv2'))
HEADED = 'fsp fitnet fitnet_mlp vid vid_sizes vid_mlp vidlp crd crd_few srrl semckd'.split()
every = pytest.mark.parametrize('name', TERMS)
headed = pytest.mark.parametrize('name', HEADED)

def student(): set_seed(1); return create('lenet5', DLS)
def make_teacher(): set_seed(2); return here(create('lenet5_caffe', DLS))
TEACHER = make_teacher()

def learner(dls=None, model=None, **kwargs): return seeded(dls or data(), model or student(), **kwargs)
def hooks(*models): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for model in models for m in model.modules())

@every
@pytest.mark.parametrize('cbs', [lambda: [MixUp()], lambda: [GradientAccumulation(128)], lambda: [CPUAutocast(), GradientClip(100.)]],
                         ids=['mixup','accumulation','bf16'])
def test_with_other_callbacks(name, cbs):
    before = [p.clone() for p in TEACHER.parameters()]
    cbs = cbs()
    few = from_arrays(X[:8], Y[:8], bs=4, valid=(X[:8],Y[:8])) if isinstance(cbs[0], CPUAutocast) else None   # bf16 is slow on a CPU
    learn = quiet(learner(few), 2, 1e-3, cbs=[KnowledgeDistillation(TEACHER, TERMS[name]), *cbs])
    assert flat(learn.model).isfinite().all() and learn.recorder.values[-1][-1]>0
    assert all(torch.equal(p, q) and p.grad is None for p,q in zip(TEACHER.parameters(), before)) and not hooks(TEACHER, learn.model)

@every
def test_around_training(name, tmp_path):
    "lr_find, validate, predict, SaveModel, load, export: with the callback attached for good"
    cb = KnowledgeDistillation(TEACHER, TERMS[name])
    learn = learner(path=tmp_path, cbs=cb)
    heads = {k: v.clone() for k,v in cb.heads.state_dict().items()}
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
    assert all(torch.equal(v, heads[k]) for k,v in cb.heads.state_dict().items())     # as they were before
    quiet(learn, 1, 1e-3, cbs=SaveModelCallback(fname='best'))
    with learn.no_bar():
        res = learn.validate()
        assert abs(res[0]-F.cross_entropy(*learn.get_preds(act=noop)).item())<1e-4 and len(res)==2      # the task loss alone
        x = learn.dls.valid.dataset[0][0]
        probs = learn.predict(x)[2]
        state = torch.load(tmp_path/'models'/'best.pth', weights_only=True)
        assert not any('head' in k for k in state if name!='simkd')
        bare = deepcopy(learn.model)
        bare.load_state_dict(state)             # a checkpoint loads into the bare network
        learn.load('best')
        learn.export('model.pkl')
        assert torch.allclose(load_learner(tmp_path/'model.pkl').predict(x)[2], probs, atol=1e-6)
    assert (tmp_path/'model.pkl').stat().st_size < 4*n_params(bare) + 200_000         # the teacher alone has 460 kB

@headed
def test_heads_are_trained_saved_and_gone(name, tmp_path):
    learn,cb = learner(path=tmp_path),KnowledgeDistillation(TEACHER, TERMS[name])
    with learn.added_cbs(cb):
        learn.create_opt()
        start,known = deepcopy(cb.heads.state_dict()),{id(p) for g in learn.opt.param_lists for p in g}
        trained = [p for p in cb.heads.parameters() if p.requires_grad]
        assert trained and all(id(p) in known for p in trained)
        quiet(learn, 2, 1e-2)
        assert all((p-q).abs().max()>0 for (k,p),q in zip(cb.heads.state_dict().items(), start.values()) if 'weight' in k and 'rest' not in k)
        learn.save('end')
        end = deepcopy(cb.heads.state_dict())
        quiet(learn, 1, 1e-2)
        learn.load('end')
        assert all(torch.equal(p, q) for p,q in zip(cb.heads.state_dict().values(), end.values()))
        assert set(deepcopy(learn.model).state_dict())==set(student().state_dict())
    assert {id(p) for g in learn.opt.param_lists for p in g}=={id(p) for p in learn.model.parameters()}
    assert not [k for k,_ in learn.model.named_modules() if 'head' in k]
    learn.load('end')                           # loads without the callback as well
    assert learn.splitter is trainable_params

def test_a_file_is_loaded_beside_other_heads(tmp_path):
    learn = learner(path=tmp_path, cbs=KnowledgeDistillation(TEACHER, FitNet('conv2')))
    learn.save('one', with_opt=False)
    for term in (VID('conv2'), FitNet('conv1')):        # other names, other sizes
        other = learner(path=tmp_path, cbs=(cb := KnowledgeDistillation(TEACHER, term)))
        nn.init.zeros_(other.model.conv1.weight)
        heads = flat(cb.heads)
        other.load('one', with_opt=False)
        assert torch.equal(other.model.conv1.weight, learn.model.conv1.weight) and torch.equal(flat(cb.heads), heads)

def test_a_second_distillation_leaves_the_first_alone():
    learn = learner(cbs=(cb := KnowledgeDistillation(TEACHER, VID('conv2'))))
    with pytest.raises(ValueError, match='has a KnowledgeDistillation already'): quiet(learn, 1, 1e-3, cbs=KnowledgeDistillation(TEACHER, VID('conv1')))
    assert learn.model.distill_heads is cb.heads
    quiet(learn, 1, 1e-3)

def test_crd_s_memory_is_of_one_training_set():
    learn = learner(cbs=KnowledgeDistillation(TEACHER, CRD({'fc2': 'fc1'})))
    quiet(learn, 1, 1e-3)
    learn.dls = learn.dls.few(5)
    with pytest.raises(ValueError, match='memory of another training set'): quiet(learn, 1, 1e-3)
    learn.remove_cb(KnowledgeDistillation)
    quiet(learn, 1, 1e-3, cbs=KnowledgeDistillation(TEACHER, CRD({'fc2': 'fc1'})))

@headed
def test_heads_join_an_optimiser_that_exists(name):
    "fit_one_cycle makes the optimiser before it adds its callbacks; here under a splitter that does not know heads, and torch's Adam"
    for opt_func in (Adam, partial(OptimWrapper, opt=torch.optim.Adam)):
        learn,cb = learner(splitter=lambda m: [list(m.conv1.parameters()), [p for n,p in m.named_parameters() if n[:5]!='conv1']], opt_func=opt_func),KnowledgeDistillation(TEACHER, TERMS[name])
        start = None
        class Look(Callback):
            def before_fit(self): nonlocal start; start = flat(cb.heads).clone()
        quiet(learn, 2, slice(1e-3,1e-2), fit='fit_one_cycle', cbs=[cb, Look()])
        assert not torch.equal(flat(cb.heads), start) and [len(g) for g in learn.opt.param_lists]==[2,8]
        quiet(learn, 1, 1e-3, fit='fit_one_cycle')

def test_weight_0_is_plain_training():
    plain = flat(quiet(learner(), 2, 1e-3).model)
    for name,term in TERMS.items():
        if name!='simkd': assert torch.equal(flat(quiet(learner(), 2, 1e-3, cbs=KnowledgeDistillation(TEACHER, term*0, task=1)).model), plain), name

def test_simkd_is_a_plain_module_that_is_counted(tmp_path):
    learn = learner()
    quiet(learn, TEACHER, 1, SimKD('conv2'), fit='distill')
    types = {type(m).__module__.partition('.')[0] for m in learn.model.modules()}
    assert types=={'torch'}
    parts = [TEACHER.fc1, TEACHER.fc2, learn.model.body.conv1, learn.model.body.conv2, learn.model.projector]
    assert n_params(learn.model)==sum(map(n_params, parts))
    assert all(torch.equal(learn.model.head.get_submodule(k).weight, TEACHER.get_submodule(k).weight) for k in ('fc1','fc2'))
    quiet(learn, 1, 1e-3)                       # trains on as any network

def test_simkd_in_a_frozen_learner_beside_another_term():
    "What was frozen for a while is trained when all is, and other terms keep their parameters"
    class Scaled(LossTerm):
        def __init__(self): super().__init__(lambda cb: (self.p*cb.pred).square().mean(), name='scaled'); self.p = nn.Parameter(torch.ones(()))
        def params(self, model): return [self.p]
    learn = learner(splitter=lambda m: [[*m.conv1.parameters(), *m.conv2.parameters()],[*m.fc1.parameters(), *m.fc2.parameters(), *m.fc3.parameters()]], cbs=(term := Scaled()))
    before = learn.model.conv1.weight.clone()
    learn.freeze()
    quiet(learn, TEACHER, 1, SimKD('conv2'), fit='distill')
    assert torch.equal(learn.model.body.conv1.weight, before) and term.p!=1
    learn.unfreeze()
    assert not any(p.requires_grad for p in learn.model.head.parameters())
    quiet(learn, 1, 1e-3)
    assert not torch.equal(learn.model.body.conv1.weight, before)

@every
def test_frozen_body(name):
    model = student()
    for n,p in model.named_parameters(): p.requires_grad_(n.startswith('fc3'))
    body = model.conv1.weight.clone()
    learn = quiet(learner(model=model), 1, 1e-2, cbs=KnowledgeDistillation(TEACHER, TERMS[name]))
    assert flat(learn.model).isfinite().all() and torch.equal(model.conv1.weight, body)

class TwoInputs(nn.Module):
    "A LeNet that also reads a number of each sample"
    def __init__(self, net): super().__init__(); self.net,self.scale = net,nn.Linear(1, 1)
    def forward(self, x, v): return self.net(x + self.scale(v)[:,:,None,None])

class TwoInputsDL(TensorDL):
    n_inp = 2
    def __iter__(self):
        for x,*rest in super().__iter__(): yield (x,x.as_subclass(torch.Tensor).mean((1,2,3))[:,None],*rest)

@every
def test_two_inputs(name):
    term = deepcopy(TERMS[name])
    under = lambda l: l and 'net.'+l
    if hasattr(term, 'pairs'): term.pairs = [(under(s),under(t)) for s,t in term.pairs]
    if name=='semckd': term.student_layers,term.teacher_layers = (list(map(under, o)) for o in (term.student_layers, term.teacher_layers))
    if name=='old_head': term.layer = under(term.layer)
    dls = ArrayDataLoaders(*[TwoInputsDL(o.dataset, bs=64, shuffle=i==0, after_batch=o.after_batch) for i,o in enumerate(data().loaders)])
    dls.n_inp = 2
    learn = quiet(learner(dls, TwoInputs(student())), 1, 1e-3, cbs=KnowledgeDistillation(TwoInputs(make_teacher()), term))
    assert learn.recorder.values[-1][-1]>0

def test_segmentation():
    "Every pixel is a sample: the student's answers come nearer to the teacher's at each"
    items = [(x,(x[0]>.5).long()) for x in X[:64].float()/255]
    dls = DataLoaders(*[DataLoader(items, bs=16) for _ in range(2)])
    net = lambda: nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.ReLU(), nn.Conv2d(8,3,1))
    set_seed(0); teacher,model = net(),net()
    for terms in (KD()*.9, KD(standardize=True), DKD(), DIST(), LogitsMSE()):
        learn = Learner(dls, deepcopy(model), CrossEntropyLossFlat(axis=1), opt_func=Adam, cbs=KnowledgeDistillation(teacher, terms, task=0))
        quiet(learn, 4, 1e-2)
        column = [v[-1] for v in learn.recorder.values]
        assert column[-1]<.7*column[0], terms
        check_terms(terms, model, teacher, dls)

@every
def test_last_batch_of_one(name):
    dls = data(bs=59)
    dls.train.dataset.x,dls.train.dataset.y = dls.train.dataset.x[:178],dls.train.dataset.y[:178]
    dls.train.n = 178
    learn = quiet(learner(dls), 1, 1e-3, cbs=KnowledgeDistillation(TEACHER, TERMS[name]))
    assert learn.train_iter==4 and flat(learn.model).isfinite().all()


class StopAt(Callback):
    def __init__(self, error): self.error = error
    def after_pred(self):
        if self.training and self.iter==1: raise self.error

@ends
@pytest.mark.parametrize('cache', [False,True])
@pytest.mark.parametrize('stays', [False,True])
def test_clean_after_an_end(error, cache, stays):
    dls,teacher = data(pad=1) if cache else data(),make_teacher().train()
    before = {k: getattr(dls.train, k) for k in ('index','dataset','after_batch')}
    learn = learner(dls)
    cb = KnowledgeDistillation(teacher, KD() + VID('conv2') + CRD({'fc2': 'fc1'}), cache=cache, n_views=2 if cache else None)
    if stays: learn.add_cb(cb)
    try: quiet(learn, 1, 1e-3, cbs=StopAt(error) if stays else [cb, StopAt(error)])
    except (KeyboardInterrupt,RuntimeError): pass
    assert learn._with_events.__func__ is Learner._with_events and learn.metrics.attrgot('name')==['accuracy']
    assert not hooks(learn.model, teacher) and all(m.training for m in teacher.modules())
    assert {k: getattr(dls.train, k) for k in before}==before
    if stays: learn.remove_cb(cb)
    assert learn.cbs.attrgot('name')==learner().cbs.attrgot('name') and learn.splitter is trainable_params
    quiet(learn, 1, 1e-3)

def test_two_fits_do_not_stack():
    learn,cb = learner(),KnowledgeDistillation(TEACHER, KD() + VID('conv2'))
    for _ in range(2): quiet(learn, 1, 1e-3, cbs=cb)
    assert learn.recorder.metric_names[-2:]==['kd','vid'] and learn.recorder.metric_names.count('vid')==1
    learn.add_cb(cb)
    for _ in range(2): quiet(learn, 1, 1e-3)
    assert len(learn.model.distill_heads)==1 and sum(len(g) for g in learn.opt.param_lists)==len(list(learn.model.parameters()))

def test_the_teacher_is_asked_once_a_batch_and_never_in_validation():
    teacher,calls = make_teacher(),[]
    teacher.fc2.register_forward_hook(lambda *a: calls.append((torch.is_grad_enabled(),teacher.training)))
    cb = KnowledgeDistillation(teacher, KD() + AT('conv2') + SP('conv2') + VID('conv2'))
    learn = learner(cbs=cb)
    calls.clear()
    quiet(learn, 2, 1e-3)
    assert len(calls)==2*3+1 and set(calls)=={(False,False)}      # one trial run at the beginning

def test_batchnorm_of_the_teacher_is_left_alone():
    teacher = nn.Sequential(nn.Conv2d(1,8,3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10)).train()
    before = deepcopy(teacher.state_dict())
    quiet(learner(), 2, 1e-3, cbs=KnowledgeDistillation(teacher, KD() + AT({'conv1': '1'})))
    assert all(torch.equal(v, before[k]) for k,v in teacher.state_dict().items()) and teacher[1].training

def test_callbacks_are_named(capsys):
    learner(cbs=KnowledgeDistillation(TEACHER)).show_training_loop()
    assert 'KnowledgeDistillation' in capsys.readouterr().out

def test_schedule_of_a_term_and_columns():
    terms = KD()*SchedLin(1., 0.) + VID('conv2')*(lambda pct: float(pct>=.5))
    learn = quiet(learner(), 2, 1e-3, cbs=KnowledgeDistillation(TEACHER, terms))
    assert learn.recorder.metric_names[-2:]==['kd','vid']
    assert learn.recorder.values[0][-1]==0 and learn.recorder.values[1][-1]!=0


def timm_net(): return timm.create_model('mobilenetv3_small_050', num_classes=10)
@pytest.mark.parametrize('make', [lambda: ResNet(BasicBlock, [1]*4, 10), lambda: XResNet(ResBlock, 1, [1]*4, n_out=10),
                                  lambda: MobileNetV2(10, inverted_residual_setting=[[1,16,1,1],[6,24,2,2],[6,32,2,2],[6,64,2,2]]), timm_net],
                         ids=['torchvision','fastai','mobilenet','timm'])
def test_models_as_they_are(make):
    set_seed(0)
    dls = from_arrays(torch.randint(0, 256, (40,3,64,64), dtype=torch.uint8), torch.arange(40)%10, bs=16, valid_pct=.25)
    s,t = make(),make()
    pairs = dict(list(match_stages(s, t, dls, show=False).items())[-2:])
    learn = quiet(learner(dls, s), 1, 1e-3, cbs=KnowledgeDistillation(t, AT(pairs) + VID(pairs)))
    assert len(pairs)==2 and learn.recorder.values[-1][-1]!=0

def test_in_place_outputs_are_copied():
    "conv → bn → in-place ReLU: the features of bn are those before the ReLU, in training too"
    net = lambda: nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,10))
    s,seen = net(),[]
    class Negative(LayerTerm):
        def compare(self, f_s, f_t): seen.append((f_s.min()<0).item() and (f_t.min()<0).item()); return f_s.mean()
    quiet(learner(model=s), 1, 1e-3, cbs=KnowledgeDistillation(net(), Negative('1')))
    assert all(seen)

@pytest.mark.long
def test_compiled_student():
    "Also one that has run before it got its hooks"
    def run(model): return quiet(learner(model=model, opt_func=SGD), 1, .01, cbs=KnowledgeDistillation(TEACHER, AT('conv2')*100 + VID('conv2')))
    model = torch.compile(student(), backend='aot_eager')
    with torch.no_grad(): model(torch.zeros(2,1,8,8))
    learn,plain = run(model),run(student())
    assert torch.allclose(flat(learn.model), flat(plain.model), atol=1e-5) and not hooks(model)
    assert abs(learn.recorder.values[-1][-1]-plain.recorder.values[-1][-1])<1e-4


@pytest.mark.parametrize('name', ['kd','at','vid','crd','srrl','semckd','simkd'])
@pytest.mark.parametrize('where', ['memory','file','views'])
def test_cached_equals_uncached(name, where, tmp_path):
    def run(cache):
        learn = learner(data(pad=1 if where=='views' else 0))
        if where=='views' and not cache:            # the same views, without a cache
            views,steady = learn.dls.train.views(2)
            learn.dls.train.after_batch = steady
            class Turn(Callback):
                def before_train(self): self.dls.train.dataset = views[self.epoch % 2]
            learn.add_cb(Turn())
        cb = KnowledgeDistillation(TEACHER, TERMS[name], cache=cache and (tmp_path if where=='file' else True), n_views=2 if cache and where=='views' else None)
        return flat(quiet(learn, 3 if where=='views' else 2, 1e-3, cbs=cb).model)     # the third epoch has the first view again
    assert torch.allclose(run(True), run(False), atol=1e-5)

def test_cache_is_asked_once_and_notices_a_changed_teacher(tmp_path):
    teacher,n = make_teacher(),[0]
    teacher.register_forward_hook(lambda m,x,out: n.__setitem__(0, n[0]+len(out)))
    learn,cb = learner(),KnowledgeDistillation(teacher, KD(), cache=True)
    for _ in range(3): quiet(learn, 2, 1e-3, cbs=cb)
    assert n[0]==len(learn.dls.train.dataset)+3*64                            # all samples once, and one batch a fit to be sure
    teacher.fc2.bias.data += 1
    quiet(learn, 1, 1e-3, cbs=cb)
    assert n[0]==2*len(learn.dls.train.dataset)+4*64
    quiet(learn, 1, 1e-3, cbs=KnowledgeDistillation(teacher, KD(), cache=tmp_path/'answers'))
    assert (tmp_path/'answers'/'view0'/'0.npy').exists()
    teacher.fc2.bias.data += 1
    with pytest.raises(ValueError, match='holds the outputs of another network'): quiet(learn, 1, 1e-3, cbs=KnowledgeDistillation(teacher, KD(), cache=tmp_path/'answers'))


class Invert(Callback):
    def before_batch(self): self.learn.xb = (1-self.x,)

class Streamed(TfmdDL):
    "A loader that puts its batches together in its own way"
    def sample(self): return super().sample()

@pytest.mark.parametrize('message,terms,kw', [
    ("has no layer 'conv3'. The nearest names are 'conv2', 'conv1'", AT('conv3'), {}),
    ("has no layer 'layer1'", FitNet({'conv1': 'layer1'}), {}),
    ('CRD needs to know which sample is which', CRD({'fc2': 'fc1'}), dict(generic=Streamed, labels=True)),
    ('CRD needs the labels of the whole training set', CRD({'fc2': 'fc1'}), dict(generic=TfmdDL)),
    ('cache needs to know which sample is which, and Streamed does not say', KD(), dict(generic=Streamed, cache=True)),
    ('no method is called \'KDD\'. Did you mean \'KD\'?', 'KDD', {}),
    ('images change from epoch to epoch', KD(), dict(pad=1, cache=True)),
    ('expected maps', AT('fc1'), {}),
    ('expected maps', SimKD({'fc1': 'conv2'}), {}),
    ('Use it alone', SimKD('conv2') + KD(), {}),
    ('teacher gives 7 outputs, student 10', KD(), dict(teacher=lambda: create('lenet5', DLS, c=7))),
    ('teacher gives 7 outputs, student 10', DKD(), dict(teacher=lambda: create('lenet5', DLS, c=7))),
    ('teacher is on meta, student on ', AT('conv2'), dict(teacher=lambda: make_teacher().to('meta'))),
    ('teacher computes in torch.float16, student in torch.float32', AT('conv2'), dict(teacher=lambda: make_teacher().half())),
    ('a batch of 64, the teacher\'s a batch of 32', SP({'conv2': '0'}), dict(teacher=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,10)), halve=True)),
    ('not finite', KD(), dict(nan=True)),
    ('cache is set, but CutMix mixes', KD(), dict(cache=True, cbs=CutMix)),
    ('stored answers are not those to this batch', KD(), dict(cache=True, cbs=Invert)),
    ('DataParallel', KD(), dict(parallel=True)),
])
def test_bad_input(message, terms, kw):
    kw = dict(kw)
    teacher = kw.pop('teacher', make_teacher)()
    if kw.pop('nan', False): teacher.fc2.bias.data.fill_(float('nan'))
    if kw.pop('halve', False):
        class Halve(nn.Module):
            def forward(self, x): return x[:len(x)//2]
        teacher = nn.Sequential(Halve(), *teacher)
    dls = data(pad=kw.pop('pad', 0))
    if generic := kw.pop('generic', None):
        items = ArrayDataset(X.float()/255, Y, vocab=range(10)) if kw.pop('labels', False) else list(zip(X.float()/255, Y))
        dls = DataLoaders(*[generic(items, bs=64, num_workers=0) for _ in range(2)])
    learn = learner(dls)
    if kw.pop('parallel', False): learn.model = nn.DataParallel(learn.model)
    cbs = L(kw.pop('cbs', None)).map(lambda o: o())
    names = learn.cbs.attrgot('name')
    with pytest.raises(ValueError) as e: quiet(learn, teacher, 1, terms, fit='distill', cbs=cbs, **kw)
    assert message in str(e.value) and learn.cbs.attrgot('name')==names and not hooks(learn.model, teacher)

def test_bad_terms():
    for message,f in [('2 layers of the student (a, b) but 1 of the teacher', lambda: VID(['a','b'], ['c'])), ('no layers are given', lambda: AT({})),
                      ('expected two or more', lambda: FSP('a')), ('SimKD has 2 pairs', lambda: SimKD(['a','b'])), ('T is 0', lambda: DKD(T=0)),
                      ('weight is -1', lambda: KD()*-1), ('terms is an empty sum', lambda: KnowledgeDistillation(TEACHER, Terms())),
                      ('a chain of 1 learner', lambda: teacher_assistant([learner()], 1)), ('1 numbers of epochs are given for 2', lambda: teacher_assistant([learner()]*3, [1]))]:
        with pytest.raises(ValueError) as e: f()
        assert message in str(e.value)

def test_teacher_assistant():
    chain = [learner(model=m) for m in (make_teacher(), create('lenet300', DLS, hidden=(30,)), create('lenet300', DLS, hidden=(8,)))]
    before = [flat(l.model).clone() for l in chain]
    with chain[0].no_bar(),chain[1].no_bar(),chain[2].no_bar(),chain[1].no_logging(),chain[2].no_logging(): last = teacher_assistant(chain, [1,2], lr_max=1e-2)
    assert last is chain[2] and [torch.equal(flat(l.model), b) for l,b in zip(chain, before)]==[True,False,False]


@pytest.mark.parametrize('name', ddp.TERMS)
def test_two_processes_equal_one(name, two_ranks):
    one,first,second = ddp.train(name),*(o[name] for o in two_ranks)
    assert any('head' in k or 'projector' in k for k in one)
    for k,v in one.items():
        assert torch.equal(first[k], second[k]), k
        assert torch.allclose(first[k], v, atol=1e-5), k

class Functional(nn.Module):
    "Dropout by a function, before the maps or after"
    def __init__(self, early=0., late=0.): super().__init__(); self.c,self.f,self.early,self.late = nn.Conv2d(1,4,3),nn.Linear(4,10),early,late
    def forward(self, x):
        x = self.c(F.dropout(x, self.early, self.training) if self.early else x)
        return self.f(F.dropout(x.mean((2,3)), self.late, self.training))

def test_what_hangs_on_the_mode_is_frozen_in_evaluation_or_refused():
    x = torch.randn(2,4,6,6)
    rest = rest_of(Functional(late=.5).train(), 'c', x, x)
    assert torch.equal(rest.train()(x), rest(x))
    learner(model=Functional(late=.5)).distill(Functional(early=.5, late=.5), 1, SimKD('c'))
    with pytest.raises(ValueError, match='other things in training'): learner(model=Functional(early=.5)).distill(Functional(), 1, SimKD('c'))


# What an optimiser, and a file, know of heads

OPTS = dict(adam=Adam, ranger=ranger, torch=partial(OptimWrapper, opt=torch.optim.AdamW))
opts = pytest.mark.parametrize('opt', OPTS)
HEADS_OF = FitNet('conv2') + VID('conv1') + CRD({'fc2': 'fc1'})

@contextmanager
def warnings_as_errors(word):
    "No warning that says `word` may come"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        yield
    assert not [o for o in said if word in str(o.message)]

def optimiser_of(learn):
    "Parameters by group, and all that it keeps something of"
    return [[id(p) for p in g] for g in learn.opt.param_lists],[{id(p) for p in s} for s in param_states(learn.opt)]
def is_bare(learn):
    "Nothing of a term is in the learner"
    own,(groups,states) = {id(p) for p in learn.model.parameters()},optimiser_of(learn)
    return (set(sum(groups, []))==own and all(s<=own for s in states) and not {'save','load','_with_events'} & vars(learn).keys()
            and 'distill_heads' not in learn.model._modules and learn.splitter is trainable_params and learn.metrics.attrgot('name')==['accuracy'])

def prepared(how, tmp_path, opt):
    learn = learner(path=tmp_path, opt_func=OPTS[opt])
    with learn.no_bar():
        if how=='lr_find': learn.lr_find(num_it=6, show_plot=False)
        elif how=='load': learn.create_opt(); learn.save('x'); learn.load('x')
        elif how=='best': quiet(learn, 1, 1e-3, cbs=SaveModelCallback(with_opt=True))
        elif how=='frozen': quiet(learn, 1, 1e-3); learn.freeze_to(0); learn.opt.clear_state()
        elif how=='export': quiet(learn, 1, 1e-3); learn.export('x.pkl')
        elif how=='state': quiet(learn, 1, 1e-3); learn.opt.load_state_dict(deepcopy(learn.opt.state_dict()))
    return learn

@opts
@pytest.mark.parametrize('how', ['lr_find','load','best','frozen','export','state'])
def test_heads_join_an_optimiser_in_any_state(how, opt, tmp_path):
    learn = prepared(how, tmp_path, opt)
    start = None
    class Look(Callback):
        def before_fit(self): nonlocal start; start = flat(self.learn.model.distill_heads).clone()
    for _ in range(2):
        cb = KnowledgeDistillation(TEACHER, HEADS_OF)
        quiet(learn, 1, 1e-2, cbs=[cb, Look()])
        assert not torch.equal(flat(cb.heads), start) and is_bare(learn)
    learn.unfreeze(); quiet(learn, 1, 1e-3)

@opts
def test_nothing_of_a_head_stays_in_the_optimiser(opt, tmp_path):
    "After a fit, after an error, after a removal; and the saved state fits a bare learner and a new one with heads"
    learn = learner(path=tmp_path, opt_func=OPTS[opt])
    for end in (None, RuntimeError('boom'), KeyboardInterrupt()):
        try: quiet(learn, TEACHER, 1, HEADS_OF, fit='distill', cbs=StopAt(end) if end else None)
        except (RuntimeError,KeyboardInterrupt): pass
        assert is_bare(learn)
    learn.add_cb(cb := KnowledgeDistillation(TEACHER, HEADS_OF))
    quiet(learn, 1, 1e-3)
    learn.freeze_to(len(learn.opt.param_lists))     # all of it, heads too
    learn.remove_cb(cb)
    learn.unfreeze()
    assert is_bare(learn) and all(p.grad is None for p in cb.heads.parameters())
    learn.save('end')
    other = learner(path=tmp_path, opt_func=OPTS[opt])
    with warnings_as_errors('optimizer'): other.load('end')
    quiet(other, TEACHER, 1, HEADS_OF, fit='distill')
    assert is_bare(other)

@opts
def test_a_file_saved_beside_heads_is_the_bare_learner_s(opt, tmp_path):
    "Neither the memory of CRD nor the training labels, nor what the optimiser keeps of heads; what terms learnt comes back here"
    learn = learner(path=tmp_path, opt_func=OPTS[opt])
    learn.add_cb(cb := KnowledgeDistillation(TEACHER, HEADS_OF))
    quiet(learn, 1, 1e-3)
    before = optimiser_of(learn)
    learn.save('with'); learn.save('w_in', with_opt=False)
    assert optimiser_of(learn)==before
    heads,kept = deepcopy(cb.heads.state_dict()),deepcopy([s[p] for s in param_states(learn.opt)[-1:] for p in cb._params])
    quiet(learn, 1, 1e-2)
    with warnings_as_errors('optimizer'): learn.load('with')
    assert all(torch.equal(v, heads[k]) for k,v in cb.heads.state_dict().items()) and [list(map(id, g)) for g in learn.opt.param_lists]==before[0]
    now = [s[p] for s in param_states(learn.opt)[-1:] for p in cb._params]
    assert all(a.keys()==b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a) for a,b in zip(kept, now))
    quiet(learn, 1, 1e-3)
    learn.load('with')
    learn.remove_cb(cb)
    learn.save('bare'); learn.save('w_no', with_opt=False)
    with warnings_as_errors('optimizer'): learn.load('with')
    size = {k: (tmp_path/'models'/f'{k}.pth').stat().st_size for k in ('with','bare','w_in','w_no')}
    assert size['with']==size['bare'] and size['w_in']==size['w_no']

def test_search_and_best_epoch_with_heads_that_stay(tmp_path):
    "A search for a rate leaves heads and all that is kept of them as they were"
    for opt_func in OPTS.values():
        learn = learner(path=tmp_path, opt_func=opt_func, cbs=(cb := KnowledgeDistillation(TEACHER, HEADS_OF)))
        quiet(learn, 1, 1e-3, cbs=SaveModelCallback(with_opt=True))
        heads,groups = deepcopy(cb.heads.state_dict()),optimiser_of(learn)[0]
        with learn.no_bar(),warnings_as_errors('optimizer'): learn.lr_find(num_it=6, show_plot=False)
        assert all(torch.equal(v, heads[k]) for k,v in cb.heads.state_dict().items()) and optimiser_of(learn)[0]==groups
        quiet(learn, 1, 1e-3)
        learn.remove_cb(cb)
        assert is_bare(learn)

def test_an_optimiser_that_knows_no_splitter_trains_heads():
    model = student()
    learn = learner(model=model, opt_func=OptimWrapper(opt=torch.optim.SGD(model.parameters(), lr=.1)))
    learn.add_cb(cb := KnowledgeDistillation(TEACHER, VID('conv2')))
    start = flat(cb.heads).clone()
    quiet(learn, 1, 1e-2)
    assert not torch.equal(flat(cb.heads), start)
    learn.remove_cb(cb)
    assert is_bare(learn)

def test_a_splitter_set_beside_a_term_stays():
    learn = learner(cbs=(cb := KnowledgeDistillation(TEACHER, VID('conv2'))))
    learn.splitter = own = lambda m: [list(m.conv1.parameters()), [p for n,p in m.named_parameters() if n[:5]!='conv1' and 'heads' not in n]]
    start = flat(cb.heads).clone()
    quiet(learn, 1, 1e-2)
    learn.remove_cb(cb)
    assert not torch.equal(flat(cb.heads), start) and learn.splitter is own and sum(map(len, learn.opt.param_lists))==10

class Fails(FitNet):
    "Its head cannot be built"
    def __init__(self, error): super().__init__('conv2'); self.error = error
    def prepare(self, o): raise self.error

@pytest.mark.parametrize('error', [RuntimeError('shapes'), KeyError('k'), ValueError('no'), AttributeError('a'), MemoryError('m'), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('how', ['lr_find','state'])
def test_a_failed_attachment_leaves_the_learner_as_it_was(error, how, tmp_path):
    learn = prepared(how, tmp_path, 'adam')
    loss,model,opt = learn.loss_func,learn.model,learn.opt
    before,mode,names = optimiser_of(learn),model.training,learn.cbs.attrgot('name')
    weights,flags = flat(model).clone(),[dict(learn.opt.state[p]) for p in model.parameters()]
    for go in (lambda: quiet(learn, TEACHER, 1, VID('conv1') + Fails(error), fit='distill'), lambda: quiet(learn, 1, cbs=KnowledgeDistillation(TEACHER, VID('conv1') + Fails(error)))):
        with pytest.raises(type(error)): go()
        assert is_bare(learn) and optimiser_of(learn)==before and (learn.loss_func,learn.model,learn.opt,model.training)==(loss,model,opt,mode)
        assert torch.equal(flat(model), weights) and learn.cbs.attrgot('name')==names
        assert [list(learn.opt.state[p]) for p in model.parameters()]==[list(o) for o in flags]
    quiet(learn, TEACHER, 1, HEADS_OF, fit='distill')

def test_simkd_that_never_trained_gives_the_student_back():
    learn = learner()
    learn.create_opt()
    model,opt = learn.model,learn.opt
    def boom(*args, **kwargs): raise OSError('full')
    for go in (lambda: learn.distill(TEACHER, 1, SimKD('conv2'), nonsense=3), lambda: quiet(learn, make_teacher().to('meta'), 1, SimKD('conv2'), fit='distill'),
               lambda: quiet(learn, 1, cbs=[KnowledgeDistillation(TEACHER, SimKD('conv2')), Callback(before_epoch=boom)])):
        with pytest.raises((TypeError,ValueError,OSError,RuntimeError,NotImplementedError)): go()
        assert learn.model is model and learn.opt is opt and is_bare(learn)
    learn.add_cb(cb := KnowledgeDistillation(TEACHER, SimKD('conv2'))).remove_cb(cb)
    assert learn.model is model and is_bare(learn)
    quiet(learn, TEACHER, 1, SimKD('conv2'), fit='distill')
    assert learn.model is not model

def test_a_callback_is_added_once_and_moves():
    one,two = learner(),learner()
    one.add_cb(cb := KnowledgeDistillation(TEACHER, VID('conv2')))
    with pytest.raises(ValueError, match='is in the learner already'): one.add_cb(cb)
    with pytest.raises(ValueError, match='is in the learner already'): quiet(one, 1, cbs=cb)
    quiet(one, 1, 1e-3)
    two.add_cb(cb)
    assert cb not in one.cbs and is_bare(one) and cb.learn is two
    quiet(one, 1, 1e-3); quiet(two, 1, 1e-3)
    two.remove_cb(cb)
    assert is_bare(two)

def test_heads_are_resumed_exactly(tmp_path, monkeypatch):
    "Checkpoints hold what the rest of a training needs: memories of CRD and what the optimiser keeps of heads"
    monkeypatch.setattr(Checkpoint, 'share', None)
    class Stop(Exception): pass
    class At(Callback):
        def __init__(self, epoch): self._at = epoch
        def before_batch(self):
            if self.training and (self.epoch,self.iter)==(self._at,1): raise Stop('here')
    def run(path, at=-1):
        learn,cb = learner(),KnowledgeDistillation(TEACHER, KD() + HEADS_OF)
        quiet(learn, 4, 1e-3, fit='fit_one_cycle', cbs=[cb, At(at), Checkpoint(path)])
        held = {k for f in path.rglob('*.safetensors') for k in load_state(f)['model']}
        assert any('memory_s' in k for k in held) and not any(k.split('.')[-1] in ('labels','by_class') for k in held)     # those come with the data
        return flat(learn.model),cb.heads.state_dict()
    whole = run(tmp_path/'whole')
    for at in (1,3):
        with pytest.raises(Stop): run(tmp_path/'killed', at)
    again = run(tmp_path/'killed')
    assert torch.equal(whole[0], again[0]) and all(torch.equal(v, again[1][k]) for k,v in whole[1].items())


# Batches without targets

class Unlabelled(Callback):
    "Take the targets of every `every`-th training batch away"
    order = -9
    def __init__(self, every=1): self.every = every
    def before_batch(self):
        if self.training and self.iter%self.every==0: self.learn.yb = ()

def test_unlabelled_images_train_on_the_teacher_alone():
    "As with labels and no task loss, bit for bit, and the loss that is shown is the one trained on"
    for terms in (KD(), KD() + VID('conv2') + AT('conv1')*9):
        with_labels = quiet(learner(), 2, 1e-3, cbs=KnowledgeDistillation(TEACHER, terms, task=0))
        without = quiet(learner(), 2, 1e-3, cbs=[Unlabelled(), kd := KnowledgeDistillation(TEACHER, terms, task=0)])
        assert torch.equal(flat(with_labels.model), flat(without.model)) and kd.mean('kd')>0
        assert torch.equal(torch.stack(list(with_labels.recorder.losses)), torch.stack(list(without.recorder.losses)))
        assert with_labels.recorder.values==without.recorder.values and with_labels.recorder.lrs==without.recorder.lrs

@pytest.mark.parametrize('cache', [False,True])
def test_a_dataset_without_targets(cache):
    dls = data()
    for o in dls.loaders: o.dataset.y = None
    seen = []
    learn = learner(dls)
    learn.metrics = []
    learn.add_cb(Callback(after_batch=lambda cb: seen.append(learn.yb)))
    before = flat(learn.model).clone()
    quiet(learn, TEACHER, 2, KD() + AT('conv2'), cache=cache, fit='distill')
    assert not torch.equal(flat(learn.model), before) and all(len(o)==0 for o in seen) and len(learn.recorder.losses)==6
    assert learn.recorder.values[-1][0]<learn.recorder.values[0][0]

@pytest.mark.parametrize('cbs', [lambda: [GradientAccumulation(128)], lambda: [CPUAutocast(), GradientClip(1.)], 
                                 lambda: [MixedPrecision(AMPMode.BF16)], lambda: [Lasso()]], ids=['accumulation','bf16 and clip','fp16','penalty'])
def test_unlabelled_beside_other_callbacks(cbs):
    plain = quiet(learner(), 2, 1e-3, cbs=[KnowledgeDistillation(TEACHER, KD(), task=0), *cbs()])
    learn = quiet(learner(), 2, 1e-3, cbs=[KnowledgeDistillation(TEACHER, KD(), task=0), Unlabelled(), *cbs()])
    assert torch.equal(flat(plain.model), flat(learn.model)) and plain.recorder.values==learn.recorder.values

def Lasso(): return LossTerm(lambda cb: sum(p.abs().sum() for p in cb.model.parameters()), .01, name='lasso')

def test_a_mixed_loader():
    "Half of the batches have targets: those train on both; metrics of training are of those alone"
    learn = learner()
    learn.recorder.train_metrics = True
    seen = []
    class See(Callback):
        order = 40
        def after_batch(self):
            if self.training: seen.append((len(self.yb), self.loss.item()))
    kd = KnowledgeDistillation(TEACHER, KD(), task=1)
    quiet(learn, 2, 1e-3, cbs=[Unlabelled(2), kd, See()])
    assert [n for n,_ in seen]==[0,1,0]*2 and len(learn.recorder.losses)==6 and all(v==v for v in learn.recorder.values[-1])
    y = learn.recorder.metric_names.index('train_accuracy')-1
    assert 0<learn.recorder.values[-1][y]<1

def test_unlabelled_in_a_search_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, 'share', None)
    learn = learner(path=tmp_path, cbs=[Unlabelled(), KnowledgeDistillation(TEACHER, KD() + VID('conv2'))])
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
    assert len(learn.recorder.losses)==6 and all(o>0 for o in learn.recorder.losses)
    whole = flat(quiet(learner(cbs=[Unlabelled(), KnowledgeDistillation(TEACHER, KD())]), 3, 1e-3, cbs=Checkpoint(tmp_path/'a')).model)
    class Stop(Exception): pass
    def stop(cb=None): raise Stop('here')
    at = Callback(); vars(at)['after_train'] = lambda: at.epoch==1 and stop()
    with pytest.raises(Stop): quiet(learner(cbs=[Unlabelled(), KnowledgeDistillation(TEACHER, KD())]), 3, 1e-3, cbs=[at, Checkpoint(tmp_path/'b')])
    assert torch.equal(whole, flat(quiet(learner(cbs=[Unlabelled(), KnowledgeDistillation(TEACHER, KD())]), 3, 1e-3, cbs=Checkpoint(tmp_path/'b')).model))

def test_plain_fastai_loaders_of_images_alone():
    ds = torch.utils.data.TensorDataset(X[:100].float()/255)
    dls = DataLoaders.from_dsets(ds, ds, bs=32, num_workers=0)
    learn = Learner(dls, student(), CrossEntropyLossFlat())
    before = flat(learn.model).clone()
    quiet(learn, TEACHER, 2, KD() + FitNet('conv2'), fit='distill')
    assert not torch.equal(flat(learn.model), before) and learn.recorder.values[-1][0]>0

def test_a_training_of_nothing_is_refused(tmp_path):
    for terms in (KD()*0, KD()*(lambda pct: 0.)):
        learn = learner(path=tmp_path)
        with pytest.raises(ValueError, match='nothing is trained: no batch of this training has targets, and no term has a weight'):
            quiet(learn, 2, 1e-3, cbs=[KnowledgeDistillation(TEACHER, terms), Unlabelled()])
        assert learn.metrics.attrgot('name')==['accuracy']
    with pytest.raises(ValueError, match='nothing is trained'), learn.no_bar():
        learn.add_cbs([KnowledgeDistillation(TEACHER, KD()*SchedLin(0., 1.)), Unlabelled()]).lr_find(num_it=6, show_plot=False)
    learn = learner()
    learn.add_cb(Unlabelled())
    quiet(learn, 2, 1e-3, cbs=KnowledgeDistillation(TEACHER, KD()*(lambda pct: float(pct>=.5))))     # in the second epoch
    quiet(learn, 1, 1e-3, cbs=[KnowledgeDistillation(TEACHER, KD()*0), Lasso()])                     # another term has a weight

def test_a_sample_that_lost_its_place_is_not_taken_for_another():
    "A callback that takes all of `yb` takes the sample's places, too; `SampleIndex` comes before it"
    for every in (1,2):
        with pytest.raises(ValueError, match='without the places of its samples: another callback'):
            quiet(learner(), 1, cbs=[KnowledgeDistillation(TEACHER, KD(), cache=True), Unlabelled(every)])
        a,b = (flat(quiet(learner(), 2, 1e-3, cbs=[KnowledgeDistillation(TEACHER, KD(), task=0, cache=cache), Unlabelled(every), SampleIndex()]).model) for cache in (False,True))
        assert torch.allclose(a, b, atol=1e-5)

def test_mixup_refuses_them():
    with pytest.raises(ValueError, match='MixUp mixes targets'): quiet(learner(), 1, cbs=[KnowledgeDistillation(TEACHER), Unlabelled(), MixUp()])

@pytest.mark.parametrize('name', ['DKD','CRD'])
def test_terms_that_need_targets_refuse_batches_without(name):
    dls = data()
    if name=='CRD': dls.train.dataset.y = None
    with pytest.raises(ValueError, match=f'{name} needs (targets|the labels)'):
        quiet(learner(dls), 1, 1e-3, cbs=[KnowledgeDistillation(TEACHER, DKD() if name=='DKD' else CRD({'fc2': 'fc1'})), Unlabelled()])


# What networks return

Named = namedtuple('Named', 'logits aux')
class Output(OrderedDict):
    "As Hugging Face's: a dict with attributes"
    def __getattr__(self, k): return self[k]
@dataclass
class Plain:
    loss: object
    logits: object
RETURNS = dict(dict=lambda z: dict(out=z, aux=-z), tuple=lambda z: (z,[z,-z]), list=lambda z: [z,None], named=lambda z: Named(z, -z), hf=lambda z: Output(loss=z.mean(), logits=z),
               dataclass=lambda z: Plain(z.mean(), z), single=lambda z: dict(scores=z), loss_first=lambda z: (z.mean(),z), nested=lambda z: ((z,-z),z))
class Returns(nn.Module):
    def __init__(self, net, how): super().__init__(); self.net,self.how = net,how
    def forward(self, x): return self.how(self.net(x))

def at(term): return term.__class__({f'net.{s}': f'net.{t}' for s,t in term.pairs}) if hasattr(term, 'pairs') else term
PLAIN = {}
def plain_run(terms):
    if str(terms) not in PLAIN: PLAIN[str(terms)] = flat(quiet(learner(model=Returns(student(), noop)), 1, 1e-3, cbs=KnowledgeDistillation(Returns(TEACHER, noop), terms)).model)
    return PLAIN[str(terms)]

@pytest.mark.parametrize('how', RETURNS)
@pytest.mark.parametrize('cache', [False,True])
def test_usual_containers_are_understood(how, cache):
    "Of the teacher and of the student, whose own loss goes on seeing what it returns"
    terms,seen = KD() + at(AT('conv2')) + at(VID('conv2')),[]
    class Loss(CrossEntropyLossFlat):
        def __call__(self, out, y): seen.append(type(out)); return super().__call__(as_logits(out), y)
    learn = learner(model=Returns(student(), RETURNS[how]))
    learn.loss_func,learn.metrics = Loss(),[]
    quiet(learn, 1, 1e-3, cbs=KnowledgeDistillation(Returns(TEACHER, RETURNS[how]), terms, cache=cache))
    assert torch.allclose(flat(learn.model), plain_run(terms), atol=0 if not cache else 1e-5) and set(seen)=={type(RETURNS[how](torch.zeros(1,10)))}
    check_terms(terms, Returns(student(), RETURNS[how]), Returns(TEACHER, RETURNS[how]), DLS)

@pytest.mark.parametrize('name', ['lwf','srrl','vidlp','dist'])
def test_terms_with_parts_of_the_teacher_understand_them_too(name):
    term = deepcopy(TERMS[name])
    if hasattr(term, 'pairs'): term.pairs = [(s,t and f'net.{t}') for s,t in term.pairs]
    a = quiet(learner(), 1, 1e-3, cbs=KnowledgeDistillation(Returns(TEACHER, RETURNS['dict']), term))
    b = quiet(learner(), 1, 1e-3, cbs=KnowledgeDistillation(TEACHER, TERMS[name]))
    assert torch.allclose(flat(a.model), flat(b.model), atol=1e-6)
    if name=='srrl': quiet(learner(), Returns(TEACHER, lambda z: dict(a=-z, b=z)), 1, term, logits='b', fit='distill')

def test_what_stands_first_in_a_tuple_may_be_no_logits():
    class First(Returns):
        def forward(self, x): return self.how(self.net(x), x)
    learn = learner(model=First(student(), lambda z,x: (x,z)))
    learn.loss_func,learn.metrics = lambda out,y: F.cross_entropy(out[1], y),[]
    teacher = First(TEACHER, lambda z,x: (x,z))
    with pytest.raises(ValueError, match=r'logits has shape \(64, 1, 8, 8\), and targets are one class for each of 64 images. Name the logits'):
        quiet(learn, teacher, 1, DIST(), fit='distill')
    quiet(learn, teacher, 1, DIST(), logits=1, fit='distill')
    with pytest.raises(ValueError, match='the function logits= fails on that: .*so it must know both'):
        quiet(learn, TEACHER, 1, KD(), logits=lambda o: o[1] if isinstance(o, tuple) else o['z'], fit='distill')

def test_simkd_with_a_teacher_that_returns_a_dict():
    learn = learner()
    quiet(learn, Returns(TEACHER, RETURNS['dict']), 1, SimKD({'conv2': 'net.conv2'}), fit='distill')
    assert learn.model(*inputs(learn.dls)).shape[1:]==(10,)

@pytest.mark.parametrize('logits', ['b', lambda o: o if isinstance(o, torch.Tensor) else o['b']], ids=['key','function'])
@pytest.mark.parametrize('cache', [False,True,'folder'])
def test_logits_names_the_rest(logits, cache, tmp_path):
    cache = tmp_path/'said' if cache=='folder' else cache
    odd,terms = Returns(TEACHER, lambda z: dict(a=-z, b=z)),KD() + AT({'conv2': 'net.conv2'})
    plain = flat(quiet(learner(), 1, 1e-3, cbs=KnowledgeDistillation(Returns(TEACHER, noop), terms)).model)
    learn = learner()
    with pytest.raises(ValueError, match="the teacher returns a dict with 'a', 'b', and what of it are the logits is not known. Name them: logits='key'"):
        quiet(learn, odd, 1, terms, cache=cache and True, fit='distill')
    for _ in range(2):
        learn = learner()
        quiet(learn, 1, 1e-3, cbs=KnowledgeDistillation(odd, terms, cache=cache, logits=logits))
        assert torch.allclose(flat(learn.model), plain, atol=1e-5)
    with pytest.raises(ValueError, match="is not found in it"): quiet(learner(), odd, 1, terms, logits='c', fit='distill')

@pytest.mark.parametrize('cache', [False,True])
def test_features_need_no_logits(cache):
    "Not known in what the networks return, and not asked for"
    odd = lambda z: dict(boxes=-z, scores=z)
    learn = learner(model=Returns(student(), odd))
    learn.loss_func,learn.metrics = lambda out,y: F.cross_entropy(out['scores'], y),[]
    quiet(learn, Returns(TEACHER, odd), 1, at(AT('conv2')) + at(FitNet('conv2')), cache=cache, fit='distill')
    with pytest.raises(ValueError, match='the (teacher|student) returns a dict'): quiet(learn, Returns(TEACHER, odd), 1, KD() + at(AT('conv2')), cache=cache, fit='distill')

def test_inputs_in_a_dict_reach_the_teacher():
    class FromDict(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, b): return dict(logits=self.net(b['x']))
    class Pack(Callback):
        order = -9
        def before_batch(self): self.learn.xb = (dict(x=self.xb[0]),)
    learn = learner(model=FromDict(student()), cbs=Pack())
    learn.loss_func,learn.metrics = lambda out,y: F.cross_entropy(out['logits'], y),[]
    quiet(learn, 1, 1e-3, cbs=[KnowledgeDistillation(FromDict(TEACHER), KD()), Unlabelled(2)])
    assert learn.recorder.values[-1][-1]>0

def test_show_distilled_understands_them():
    learn = learner(model=Returns(student(), RETURNS['hf']))
    learn.show_distilled(Returns(TEACHER, lambda z: dict(a=-z, b=z)), n=2, logits=lambda o: o['b'] if 'b' in o else o['logits'])


# Unclear errors

class Whole(nn.Linear):
    def __repr__(self): return 'a whole network is printed'

@pytest.mark.parametrize('message,make', [
    ('teacher is the function resnet18, expected a trained Learner or nn.Module. Call it: resnet18\\(...\\)', lambda: learner().distill(resnet18, 1)),
    ('teacher is the function resnet18', lambda: learner().distill(Learner(DLS, resnet18), 1)),
    ('teacher is the class Linear, .* Call it: Linear\\(...\\)', lambda: KnowledgeDistillation(nn.Linear)),
    ("the learner's model is the function resnet18, expected nn.Module. Call it", lambda: Learner(DLS, resnet18).distill(TEACHER, 1)),
    ("the learner's model is the function resnet18", lambda: Learner(DLS, resnet18).fit(1, cbs=KnowledgeDistillation(TEACHER))),
    ("the learner's model is the class Whole", lambda: Learner(DLS, Whole, cbs=KnowledgeDistillation(TEACHER))),
    ('VID compares layers, and there are 2 teachers. Say whose: VID', lambda: learner().distill([Whole(1,1), Whole(1,1)], 1, VID('conv1'))),
    ('teacher is a ModuleList, one network', lambda: learner().distill(nn.ModuleList([Whole(1,1)]), 1)),
    ('teacher is a dict of 1, one network', lambda: learner().show_distilled(dict(a=Whole(1,1)))),
    ('terms is 0.001, expected a term such as .* A learning rate is given by name: distill\\(teacher, 5, lr=0.001\\)', lambda: learner().distill(TEACHER, 5, 1e-3)),
    ('terms is slice\\(0.0001, 0.001, None\\), .* A learning rate', lambda: learner().distill(TEACHER, 5, slice(1e-4,1e-3))),
    ('terms is the class KD, .* Make one: KD\\(...\\)', lambda: learner().distill(TEACHER, 5, KD)),
    ('terms is a list of 2, .* Add them up', lambda: KnowledgeDistillation(TEACHER, [KD(), AT('conv2')])),
    ('terms is a Whole, expected a term', lambda: learner().distill(TEACHER, 5, Whole(1,1))),
    ('n_epoch is KD\\(.*\\), expected a number: distill\\(teacher, 5', lambda: learner().distill(TEACHER, KD(), 5)),
    ('T is a schedule, expected a number', lambda: CRD('fc2', T=SchedCos(4., 1.))),
    ('T is a schedule, expected a number', lambda: kd(torch.zeros(2,3), torch.zeros(2,3), T=lambda p: 4.)),
    ("T is '4', expected a temperature", lambda: DIST(T='4')),
    ("fit is 'fit_onecycle', .* Did you mean 'fit_one_cycle'", lambda: learner().distill(TEACHER, 1, fit='fit_onecycle')),
    ('task is a term', lambda: learner().distill(TEACHER, 1, KD(), AT('conv2'))),
    ('logits is a list of 1, expected a key', lambda: learner().distill(TEACHER, 1, logits=[1])),
    ('fit is the function fit, expected the name', lambda: learner().distill(TEACHER, 1, fit=learner().fit)),
    ('the chain holds a LeNet|the chain holds a Sequential', lambda: teacher_assistant([TEACHER, learner()], 1)),
    ('lr and lr_max are both given', lambda: learner().distill(TEACHER, 1, lr=.1, lr_max=.1)),
])
def test_unclear_errors_are_sentences(message, make):
    with pytest.raises(ValueError, match=message) as e: make()
    assert 'whole network' not in str(e.value) and len(str(e.value))<400

@pytest.mark.parametrize('fit,own', [('fit','lr'), ('fit_one_cycle','lr_max'), ('fit_flat_cos','lr'), ('fine_tune','base_lr'), ('fit_sgdr','lr_max')])
def test_lr_is_the_rate_of_every_fit_method(fit, own):
    more = dict(cycle_len=1) if fit=='fit_sgdr' else {}
    run = lambda **kw: flat(quiet(learner(splitter=lambda m: [list(m.conv1.parameters()), [p for n,p in m.named_parameters() if n[:5]!='conv1' and 'heads' not in n]]),
                                  TEACHER, 1, KD(), method=fit, **kw, **more).model)
    def quiet(learn, *args, method, **kw):
        with learn.no_bar(),learn.no_logging(): learn.distill(*args, fit=method, **kw)
        return learn
    a,b,c = run(lr=1e-2),run(**{own: 1e-2}),run(lr=1e-3)
    assert torch.equal(a, b) and not torch.equal(a, c)
