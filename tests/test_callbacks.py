"Both callbacks in every kind of fit: with fastai's other callbacks, after errors, and not at all when their weight is 0."
import pytest
import torch.distributed as tdist
from fastai.callback.schedule import *
from fastai.test_utils import synth_learner
from common import Two, ends, flat, here, per_item, quiet, seeded
from kdnb import processes
from kdnb.all import *

DLS = {k: image_dls('digits', **kw) for k,kw in dict(plain={}, index=dict(index=True), half=dict(bs=32)).items()}

def net(hidden=(16,)): set_seed(1); return create('lenet300', DLS['plain'], hidden=hidden)
TEACHER = here(net((32,)))

def learner(model, dls='plain', **kwargs): return seeded(DLS[dls], model, **kwargs)

def kd_learner(**kwargs): return learner(net(), cbs=[KnowledgeDistillation(TEACHER, KD(T=2)*.5, task=.5), *kwargs.pop('cbs', [])], **kwargs)
def vb_learner(**kwargs): return learner(to_variational(net()), cbs=[VariationalSparsifier(), *kwargs.pop('cbs', [])], **kwargs)
def both_learner(**kwargs): return learner(to_variational(net()), cbs=[KnowledgeDistillation(TEACHER), VariationalSparsifier(), *kwargs.pop('cbs', [])], **kwargs)
every = pytest.mark.parametrize('make', [kd_learner, vb_learner, both_learner])

@every
@pytest.mark.parametrize('fit,args', [('fit',(2,1e-3)), ('fit_one_cycle',(2,1e-3)), ('fit_flat_cos',(2,1e-3)), ('fit_sgdr',(1,1,1e-3)), ('fine_tune',(1,))])
def test_every_fit_method(make, fit, args):
    learn = make()
    before = flat(learn.model)
    if fit=='fine_tune' and make is kd_learner: learn.splitter = lambda m: [list(m.fc1.parameters()), list(m.fc2.parameters())]
    quiet(learn, *args, fit=fit)
    assert not torch.equal(before, flat(learn.model)) and flat(learn.model).isfinite().all()
    assert learn.metrics.attrgot('name')==['accuracy']

@every
@pytest.mark.parametrize('cb', [lambda: MixUp(), lambda: GradientAccumulation(128), lambda: GradientClip(.1), lambda: CutMix(), lambda: MixedPrecision(AMPMode.BF16)])
def test_with_other_callbacks(make, cb):
    learn = quiet(make(cbs=[cb()]), 2, 1e-3)
    assert flat(learn.model).isfinite().all() and learn.recorder.values[-1][0]>0

@every
def test_around_training(make, tmp_path):
    learn = make(path=tmp_path)
    quiet(learn, 1, 1e-3, cbs=SaveModelCallback(fname='best'))
    with learn.no_bar():
        learn.lr_find(num_it=10, show_plot=False)
        res = learn.validate()
        x = DLS['plain'].valid.dataset[0][0]
        label,i,probs = learn.predict(x)
    preds,y = learn.get_preds()
    assert len(res)==2 and abs(res[0]-F.nll_loss(preds.log(), y).item())<1e-4      # the task loss alone
    assert len(probs)==10 and str(label)==str(int(i))
    learn.load('best')
    learn.export('model.pkl')
    assert not any(torch.equal(p, q) for p in TEACHER.parameters() for q in _tensors(tmp_path/'model.pkl') if p.shape==q.shape)
    again = load_learner(tmp_path/'model.pkl')
    with again.no_bar(): assert torch.allclose(again.predict(x)[2], learn.predict(x)[2])

def _tensors(path):
    "All tensors in a pickled learner"
    learn,seen,found = load_learner(path),set(),[]
    def walk(o):
        if id(o) in seen or isinstance(o, (str,int,float,type(None))): return
        seen.add(id(o))
        if isinstance(o, torch.Tensor): found.append(o)
        elif isinstance(o, dict): [walk(v) for v in o.values()]
        elif isinstance(o, (list,tuple,set,L)): [walk(v) for v in o]
        elif isinstance(o, (Callback,nn.Module,Learner)): walk(vars(o))
    walk(learn)
    return found

@pytest.mark.parametrize('groups,noise', [('neurons','group'), ('neurons','full'), ('channels','full'), ('weights','group')])
def test_masks_hold_under_noise(groups, noise):
    "A pruned network made noisy, masked as it was; and masks that grow while the noise trains"
    pruned = prune_model(quiet(learner(net()), 3, 3e-3).model, .5)
    v = to_variational(pruned, DLS['plain'], groups, noise)
    assert not masks(v) and sparsity(v)==.5
    mask_model(v, masks(pruned))
    xb = DLS['plain'].one_batch()[0]
    torch.manual_seed(0); out = v.train()(xb)
    with torch.no_grad():       # what a mask hides is nowhere seen, neither its value nor its variance
        for n,mask in masks(v).items():
            raw(v, n).add_(1-mask)
            if (logvar := dict(v.named_parameters()).get(f'{n}_logvar')) is not None: logvar.add_(5*(1-mask))
    torch.manual_seed(0); test_eq(v(xb), out)
    learn = quiet(learner(v, cbs=VariationalSparsifier(gamma_weight=2.), wd=0.), 4, 3e-3)
    small = learn.compress(limit=50.)       # nothing is noise yet: only masks take away
    assert not masks(small) and all((w[masks(v)[n]==0]==0).all() for n,w in prunable(small).items())
    assert sparsity(small)>=.5 and {type(m) for m in small.modules()}<={type(m) for m in net().modules()}
    test_close(small(xb), v.eval()(xb), 1e-5)

def test_pruner_beside_sparsifier():
    learn = quiet(learner(to_variational(net()), cbs=[VariationalSparsifier(), Pruner(.6, schedule='gradual')], wd=0.), 4, 3e-3)
    left = n_weights(learn.model, nonzero=True)
    assert left==int(.4*n_weights(learn.model)) and n_weights(learn.compress(), nonzero=True)<=left

def test_weight_0_is_plain_training():
    plain = flat(quiet(learner(net()), 2, 1e-3).model)
    for cbs in (KnowledgeDistillation(TEACHER, KD()*0), LossTerm(lambda cb: 1/torch.zeros(()), weight=0)):
        assert torch.equal(flat(quiet(learner(net()), 2, 1e-3, cbs=cbs).model), plain)

def test_a_schedule_of_zero_then_one():
    late = KD()*(lambda pct: float(pct>=.5))
    learn = quiet(learner(net()), 2, 1e-3, cbs=KnowledgeDistillation(TEACHER, late))
    assert learn.recorder.values[0][-1]==0 and learn.recorder.values[1][-1]>0

@pytest.mark.parametrize('make', [lambda t: LossTerm(lambda cb: sum(p.pow(2).sum() for p in cb.model.parameters()), .01), lambda t: KnowledgeDistillation(t)])
def test_accumulated_gradient_is_the_big_batch_s(make):
    "Two half batches accumulated, one SGD step: the same as one batch"
    def one_step(dls, cbs):
        learn = learner(net(), dls, opt_func=SGD, wd=0)
        learn.dls.train.shuffle = False
        class Stop(Callback):
            def after_batch(self):
                if self.training and (self.iter+1)*self.dls.train.bs==64: raise CancelFitException
        try: quiet(learn, 1, .1, cbs=[make(TEACHER), Stop(), *cbs])
        finally: learn.dls.train.shuffle = True
        return flat(learn.model)
    assert torch.allclose(one_step('plain', []), one_step('half', [GradientAccumulation(64)]), atol=1e-6)

class StopInStep(Callback):
    "Raise `error` in the fourth training batch, while the rates are those of the step"
    order = 70
    def __init__(self, error): self.error = error
    def before_step(self):
        if self.training and self.iter==3: raise self.error

@ends
def test_clean_after_an_end(error):
    teacher = net((32,)).train()
    teacher.fc1.eval()
    learn = learner(to_variational(net()), cbs=VariationalSparsifier())
    splitter,lr = learn.splitter,None
    try: quiet(learn, 1, 1e-3, cbs=[KnowledgeDistillation(teacher), StopInStep(error)])
    except (KeyboardInterrupt,RuntimeError): pass
    learn.remove_cb(learn.variational_sparsifier)
    assert learn.metrics.attrgot('name')==['accuracy']
    assert [m.training for m in teacher.modules()]==[True,True,False]+[True]*(len(list(teacher.modules()))-3)
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert {h['lr'] for h in learn.opt.hypers}=={1e-3}
    assert learn.splitter is trainable_params

@pytest.mark.parametrize('event', ['before_epoch','before_train','after_loss','before_validate','after_epoch'])
def test_all_that_stay_are_put_back_after_an_error(event):
    teacher,learn = net((32,)).train(),learner(net())
    learn.add_cbs([KnowledgeDistillation(teacher, KD() + VID('fc1')), LossTerm(lambda cb: cb.pred.square().mean(), name='size'), Pruner(.5)])
    def boom(self=None): raise OSError('the disk is full')
    cb = Callback()
    cb.order,vars(cb)[event] = 100,boom
    with pytest.raises(OSError): quiet(learn, 1, 1e-3, cbs=cb)
    assert learn.metrics.attrgot('name')==['accuracy'] and learn._with_events.__func__ is Learner._with_events
    assert teacher.training and not any(m._forward_hooks for o in (teacher, learn.model) for m in o.modules())

def test_processes_are_parted_after_an_error(tmp_path, monkeypatch):
    tdist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    monkeypatch.setattr(processes, 'join_processes', lambda: (0,2))     # one of them is enough to see it
    try:
        learn = learner(model := net())
        learn.add_cb(Processes())
        for _ in range(2):
            with pytest.raises(RuntimeError): quiet(learn, 1, 1e-3, cbs=StopInStep(RuntimeError('boom')))
            assert learn.model is model and learn.dls.train.bs==64
        quiet(learn, 1, 1e-3)
        assert learn.model is model and learn.dls.train.bs==64 and len(learn.validate())==2
    finally: tdist.destroy_process_group()

@pytest.mark.parametrize('early', [False,True])
def test_heads_decay_as_the_network_does(early):
    "Their biases and BatchNorm not at all, whether the optimiser was there before them or not"
    learn = learner(net())
    if early: learn.create_opt()
    learn.add_cb(KnowledgeDistillation(TEACHER, FitNet('fc1')))
    if not early: learn.create_opt()
    free = {n for n,p in learn.model.named_parameters() if not learn.opt.state[p].get('do_wd', True)}
    assert free and free=={n for n,p in learn.model.named_parameters() if p.ndim==1}

def test_a_column_counts_the_batches_in_which_its_term_weighs():
    three,late = lambda cb: torch.tensor(3.),lambda pct: float(pct>=.5)
    learn = quiet(learner(net(), cbs=LossTerm(dict(all=three, half=three), dict(all=1., half=late))), 1, 1e-3)
    assert max(abs(v-3) for v in learn.recorder.values[0][-2:])<1e-5

def test_two_fits_do_not_stack():
    learn = kd_learner()
    for _ in range(2): quiet(learn, 1, 1e-3)
    assert learn.recorder.metric_names.count('kd')==1

def test_teacher_is_left_alone():
    bn = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64,10)).train()
    before,calls = deepcopy(bn.state_dict()),[]
    bn.register_forward_hook(lambda *a: calls.append(torch.is_grad_enabled() or bn.training))
    learn = learner(net())
    quiet(learn, 2, 1e-3, cbs=KnowledgeDistillation(bn))
    assert all(torch.equal(v, before[k]) for k,v in bn.state_dict().items()) and bn.training
    assert len(calls)==2*len(learn.dls.train) and not any(calls)           # once a batch, never in validation
    assert not set(map(id, bn.parameters())) & {id(p) for g in learn.opt.param_lists for p in g}

def test_teacher_sees_what_the_student_sees():
    seen = []
    class See(nn.Module):
        def __init__(self): super().__init__(); self.net,self.out = net(),None
        def forward(self, x): seen.append(x.clone()); return self.net(x)
    student,teacher = See(),See()
    quiet(learner(student), 1, 1e-3, cbs=[KnowledgeDistillation(teacher), MixUp()])
    pairs = [seen[i:i+2] for i in range(0, 2*len(DLS['plain'].train), 2)]
    assert all(torch.equal(a, b) for a,b in pairs)

def test_cached_teacher_gives_the_same_weights():
    run = lambda cache: flat(quiet(learner(net(), 'index', cbs=SampleIndex()), 3, 1e-3, cbs=KnowledgeDistillation(TEACHER, cache=cache)).model)
    assert torch.allclose(run(True), run(False), atol=1e-5)

def test_fused_torch_optimizer():
    learn = learner(to_variational(net()), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), cbs=VariationalSparsifier())
    assert flat(quiet(learn, 1, 1e-3).model).isfinite().all() and learn.opt.hypers[0]['wd']==0

def test_other_fastai_data():
    "Plain fastai DataLoaders, per-item, with a two-input model"
    learn = Learner(per_item(), to_variational(Two()), loss_func=CrossEntropyLossFlat(), cbs=VariationalSparsifier())
    quiet(learn, 2, 1e-3, cbs=KnowledgeDistillation(Two()))
    assert type(learn.compress()) is Two

def test_what_is_no_function_is_refused_at_once():
    for f,words in ((lambda: Pruner(nn.Linear(2,2)), 'sparsity is a Linear, expected a fraction'), (lambda: prune_model(nn.Linear(2,2), nn.Linear(2,2)), 'sparsity is a Linear'),
                    (lambda: LossTerm(3), "the term 'term' is 3, expected a function"), (lambda: LossTerm(dict(a=len, b=None), dict(a=1,b=1)), "the term 'b' is None")):
        with pytest.raises(ValueError, match=words): f()

def test_a_checkpoint_is_the_loop_of_one_learner_while_it_is_in_it(tmp_path):
    def own(o): return '_do_fit' not in vars(o)
    a,b,cb = synth_learner(),synth_learner(),Checkpoint(tmp_path)
    a.add_cb(cb)
    assert a._do_fit==cb._loop
    b.add_cb(cb)                      # it moves
    assert own(a) and not own(b) and cb not in a.cbs
    with pytest.raises(ValueError, match='this Checkpoint is in the learner already'): b.add_cb(cb)
    b.remove_cb(cb)
    with b.no_bar(),b.no_logging(): b.fit(1, cbs=cb)
    assert own(b) and (tmp_path/'fit0').exists()

def test_an_attach_that_fails_leaves_the_callback_free():
    class Fails(Attached, QuickCallback):
        def attach(self): raise RuntimeError('no')
    learn,cb = synth_learner(),Fails()
    with pytest.raises(RuntimeError): learn.add_cb(cb)
    assert cb.learn is None and cb not in learn.cbs
