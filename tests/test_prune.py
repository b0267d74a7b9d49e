"Counts are exact, masks hold in every kind of training and copy, scores and penalties equal slow sums in double precision."
import itertools, os, random
from decimal import ROUND_CEILING, Decimal
from types import SimpleNamespace

import pytest
from fastai.callback.schedule import *
from torch.optim.swa_utils import AveragedModel
import two_processes as ddp
from common import CPUAutocast, StopAt, Two, X, Y, data, ends, per_item, quiet, same, seeded, state
from kdnb.all import *
from kdnb.channels.trial import channel_groups


def net(drop=0.):
    "360 + 36 weights, a BatchNorm whose scales are not all 1"
    set_seed(1)
    m = nn.Sequential(OrderedDict(conv=nn.Conv2d(1,4,3,stride=2), norm=nn.BatchNorm2d(4), act=nn.ReLU(), flat=nn.Flatten(), drop=nn.Dropout(drop), fc=nn.Linear(36,10)))
    m.norm.weight.data.uniform_(.5, 1.5)
    return m

def learner(model=None, dls=None, **kwargs): return seeded(dls or data(), model or net(), **kwargs)
def part_of(a, b): return all(torch.equal(a[k], b[k]) for k in a)
def n_gone(model): return sum(int((m==0).sum()) for m in masks(model).values())
def decimal_ceil(s, n): return int((Decimal(str(s))*n).to_integral_value(ROUND_CEILING))
def all_of(worth): return torch.cat([v.flatten() for v in worth.values()])
def norm_of(model): return next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
def without_masks(s): return {k: v for k,v in s.items() if not k.endswith('_mask')}
XB = torch.stack([o for o in X[:20].float()/255])

def by_hand(model, x):
    "Outputs of `net()` in evaluation mode from its raw parameters and masks, without its layers"
    s,m = state(model),masks(model)
    w = {k: s[k]*m[k] if k in m else s[k] for k in ('conv.weight','fc.weight')}
    z = F.batch_norm(F.conv2d(x, w['conv.weight'], s['conv.bias'], stride=2), s['norm.running_mean'], s['norm.running_var'], s['norm.weight'], s['norm.bias'], eps=1e-5)
    return F.linear(z.relu().flatten(1), w['fc.weight'], s['fc.bias'])


# how many go

SPARSITIES = (0, .01, .07, .1, .29, .3, .5, .57, .58, .999, 1, 1.)

@pytest.mark.filterwarnings('ignore:this sparsity would empty')
@pytest.mark.parametrize('s', SPARSITIES)
@pytest.mark.parametrize('equal', [True,False])
def test_counts_are_exact(s, equal):
    set_seed(0)
    for n in (1, 2, 3, 7, 20, 97, 100, 1000):
        m = nn.Linear(n, 1)
        if equal: m.weight.data.fill_(.3)
        order = m.weight.detach().abs().flatten().argsort(stable=True)
        keep = prune_model(m, s).weight_mask[0]
        assert keep.tolist()==[float(i not in order[:decimal_ceil(s, n)].tolist()) for i in range(n)], n

@pytest.mark.parametrize('equal', [True,False])
@pytest.mark.parametrize('scope', ['global','layer'])
def test_twenty_weights(equal, scope):
    m,left = nn.Linear(20,1),[]
    if equal: m.weight.data.fill_(1.)
    for _ in range(7):
        left.append(n_weights(m, nonzero=True))
        prune_model(m, 1., rate=.2, scope=scope)
    assert left==[20,16,12,9,7,5,4]

def test_computed_fractions_go_exactly():
    "k of n are k, although `k/n*n` may be a little more; what lies below a valley goes, and no more"
    assert all(n_of(k/n, n)==k for n in range(1, 200) for k in range(n+1)) and n_of(1e-9, 3)==1
    worth = {'a': torch.cat([torch.linspace(0, .1, 7), torch.linspace(.8, 1, 23)])}
    assert (~select(worth, below_valley(worth))['a']).nonzero()[:,0].tolist()==list(range(7))

def test_equals_go_in_order():
    m = nn.Sequential(nn.Linear(3,2), nn.Linear(2,5))
    for o in m: o.weight.data.fill_(-1)
    m[0].weight.data[0,1] = 2
    prune_model(m, .5)
    assert m[0].weight_mask.tolist()==[[0,1,0], [0,0,0]] and m[1].weight_mask.tolist()==[[0,0], [0,1], [1,1], [1,1], [1,1]]

def test_scope_and_ignore():
    m = net()
    m.conv.weight.data *= 100
    assert {k: int((v==0).sum()) for k,v in masks(prune_model(m, .3, scope='layer')).items()}=={'conv.weight': 11, 'fc.weight': 108}
    m = net()
    m.conv.weight.data *= 100
    assert {k: int((v==0).sum()) for k,v in masks(prune_model(m, .3)).items()}=={'conv.weight': 0, 'fc.weight': 119}
    for ignore in ('fc', ['fc'], ('fc',)): assert masks(prune_model(net(), .3, ignore=ignore)).keys()=={'conv.weight'}
    nested = nn.Sequential(OrderedDict(body=net(), body2=nn.Linear(10,10)))
    assert masks(prune_model(nested, .3, ignore='body')).keys()=={'body2.weight'} and n_gone(nested)==30

def test_pruned_weights_stay_and_count():
    m = net()
    best = {k: w.abs()>=w.abs().flatten().kthvalue(int(.8*w.numel())).values for k,w in prunable(m).items()}
    mask_model(m, {k: ~v for k,v in best.items()})        # the largest are gone
    n = n_gone(m)
    prune_model(m, .5)
    assert n_gone(m)==198 and all((m.get_buffer(f'{k}_mask')[v]==0).all() for k,v in best.items())
    prune_model(m, .1)
    assert n_gone(m)==198>n
    worth = scores(m)
    assert all(torch.equal(worth[k].isneginf(), v==0) for k,v in masks(m).items())

def test_36_59_79_percent():
    levels = quietly_iterative(learner(), .79, n_epoch=1, lr=1e-3)
    gone,expected = 0,[0]
    while gone < decimal_ceil(.79, 396): expected.append(gone := min(decimal_ceil(.79, 396), gone+decimal_ceil(.2, 396-gone)))
    assert [396-o.weights for o in levels]==expected and len(levels)==8
    assert all(abs(levels[i].sparsity-s)<.01 for i,s in ((2,.36), (4,.59), (7,.79)))

@pytest.mark.parametrize('schedule,at', [('one_shot', lambda t: 1), ('gradual', lambda t: 1-(1-t)**3), ('iterative', lambda t: (1-.2**t)/.8), (lambda t: t**2, lambda t: t**2)])
@pytest.mark.parametrize('start,end', [(0,.5), (.25,.75), (.5,.5)])
def test_schedules(schedule, at, start, end):
    seen = []
    class Look(Callback):
        order = 1
        def before_batch(self):
            if self.training: seen.append((self.pct_train, n_gone(self.model)))
    learn = quiet(learner(), 4, 1e-3, cbs=[Pruner(.8, schedule=schedule, start=start, end=end, rounds=4), Look()])
    n = 1 if schedule=='one_shot' else 4
    due = [start + (end-start)*i/max(n-1, 1) for i in range(n)]
    for pct,gone in seen:
        done = sum(t <= pct+1e-9 for t in due)
        assert gone==(math.ceil(round(.8*at(done/n)*396, 6)) if done else 0), pct
    assert len(seen)==12 and abs(sparsity(learn.model)-317/396)<1e-9
    assert learn.recorder.metric_names[-1]=='sparsity' and learn.recorder.values[-1][-1]==sparsity(learn.model)

@pytest.mark.parametrize('kw', [dict(start=.9, end=.9), dict(schedule='gradual', end=.9), dict(schedule='iterative', end=.99)], ids=str)
def test_the_last_cut_is_made_in_a_short_training(kw):
    assert n_gone(quiet(learner(), 1, 1e-3, cbs=Pruner(.5, **kw)).model)==198

@pytest.mark.parametrize('fit,args', [('fit',(2,1e-3)), ('fit_one_cycle',(2,1e-3)), ('fit_flat_cos',(2,1e-3)), ('fit_sgdr',(1,1,1e-3)), ('fine_tune',(1,))])
def test_every_fit_method(fit, args):
    learn = learner(splitter=lambda m: [list(m.conv.parameters())+list(m.norm.parameters()), list(m.fc.parameters())])
    assert n_gone(quiet(learn, *args, fit=fit, cbs=Pruner(.5, schedule='gradual')).model)==198
    assert learn.metrics.attrgot('name')==['accuracy']


# masks hold

class Holds(Callback):
    "Pruned weights are 0 after every step, and their gradients before it"
    order,steps = 1000,0
    def __init__(self, grads=True): self.grads = grads
    def before_step(self): self.check(lambda m,k: m._parameters[k].grad if self.grads else torch.zeros_like(m._parameters[k]))
    def after_step(self): self.check(getattr); self.steps += 1
    def check(self, get):
        for k,mask in masks(self.model).items():
            m,_,which = k.rpartition('.')
            assert get(unwrap(self.model).get_submodule(m), which)[mask==0].count_nonzero()==0, k

KINDS = dict(sgd=dict(opt_func=partial(SGD, mom=.9), wd=.1), adam=dict(wd=.1), l2=dict(opt_func=partial(Adam, decouple_wd=False), wd=.1),
             torch=dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), wd=.1), accumulate=dict(cbs=lambda: GradientAccumulation(128)),
             mixup=dict(cbs=lambda: MixUp()), clip=dict(cbs=lambda: GradientClip(.1)), bf16=dict(cbs=lambda: CPUAutocast()))

@pytest.mark.parametrize('kind', KINDS)
def test_masks_hold(kind, tmp_path):
    "The cut comes while the optimiser has momentum; training goes on, also after loading, in a copy, in one more fit"
    kw = dict(KINDS[kind])
    learn = learner(net(.2), path=tmp_path, **kw | (dict(cbs=kw['cbs']()) if 'cbs' in kw else {}))
    hidden = {}
    class Hidden(Callback):
        order = 1
        def before_batch(self):
            if self.training and n_gone(self.model) and not hidden: hidden.update(state(self.model))
    quiet(learn, 3, 1e-2, cbs=[Pruner(.5, start=.34), holds := Holds(kind!='accumulate'), Hidden()])
    m = learn.model
    def check(m): assert n_gone(m)==198 and abs(sparsity(m)-.5)<1e-9 and torch.allclose(m.eval()(XB), by_hand(m, XB), atol=1e-5)
    check(m)
    assert holds.steps and not all(torch.equal(hidden[k][v==0], m._modules[k[:-7]]._parameters['weight'][v==0]) for k,v in masks(m).items())   # what is masked did move
    mask = {k: v.clone() for k,v in masks(m).items()}
    learn.save('half')
    twin = deepcopy(m)
    learn.opt.zero_grad()
    learn.load('half')
    quiet(learn, 1, 1e-2, reset_opt=kind=='torch', cbs=Holds())
    check(learn.model)
    assert same(masks(learn.model), mask) and same(masks(twin), mask) and not same(state(twin), state(learn.model))
    check(twin)
    quiet(learner(twin), 1, 1e-2, cbs=Holds())
    assert same(masks(twin), mask)
    check(twin)

def test_a_copy_is_a_copy():
    m = prune_model(net(), .5)
    before,twin = state(m),deepcopy(m)
    assert same(state(twin), before) and not {id(o) for o in [*twin.parameters(), *twin.buffers()]} & {id(o) for o in [*m.parameters(), *m.buffers()]}
    prune_model(twin, .9)
    for p in twin.parameters(): p.data.zero_()
    assert same(state(m), before)
    twin.fc(torch.randn(2,36)).sum().backward()
    assert twin.fc._parameters['weight'].grad is not None and m.fc._parameters['weight'].grad is None
    alone = deepcopy(m.fc)
    assert torch.equal(alone.weight, m.fc.weight) and isinstance(alone, Masked)

def test_masked_gradients_are_exactly_zero():
    m,plain = prune_model(net(), .5).eval(),net().eval()
    for k,w in prunable(m).items(): plain.get_parameter(k).data.copy_(w.detach())
    for o in (m, plain): F.cross_entropy(o(XB), Y[:20]).backward()
    for (k,p),q in zip(m.named_parameters(), plain.parameters()):
        on = masks(m).get(k, torch.ones_like(p))
        assert torch.equal(p.grad, q.grad*on) and (q.grad[on==0]!=0).any()==(k in masks(m))

def test_save_model_callback(tmp_path, capsys):
    learn = learner(path=tmp_path)
    quiet(learn, 2, 1e-2, cbs=[Pruner(.5), SaveModelCallback(fname='best'), Holds()])
    quiet(learn, 1, 1e-2, cbs=[Pruner(.7), SaveModelCallback(fname='best', with_opt=True), Holds()])
    assert n_gone(learn.model)==decimal_ceil(.7, 396) and n_gone(learn.load('best').model)==decimal_ceil(.7, 396)

@pytest.mark.parametrize('stays', [True,False])
def test_export_is_plain(tmp_path, stays):
    learn,pruner = learner(path=tmp_path),Pruner(.5, schedule='gradual')
    if stays: learn.add_cb(pruner)
    quiet(learn, 2, 1e-2, cbs=None if stays else pruner)
    probs = learn.get_preds()[0]
    learn.export('net.pkl')
    again = load_learner(tmp_path/'net.pkl')
    types = lambda m: [type(o) for o in m.modules()]
    assert types(again.model)==types(net()) and not masks(again.model) and again.model.state_dict().keys()==net().state_dict().keys()
    assert same(dict(prunable(again.model)), {k: w.detach() for k,w in prunable(learn.model).items()}) and abs(sparsity(again.model)-.5)<1e-9
    assert torch.allclose(again.get_preds(dl=learn.dls.valid)[0], probs, atol=1e-6) and isinstance(learn.model.fc, Masked)
    with again.no_bar(): assert len(again.predict(learn.dls.valid.dataset[0][0])[2])==10
    torch.save(learn.model, tmp_path/'net.pth')
    assert types(torch.load(tmp_path/'net.pth', weights_only=False))==types(net())
    quiet(learn, 1, 1e-2, cbs=Holds())
    assert n_gone(learn.model)==198

@pytest.mark.parametrize('kw', [dict(), dict(use_buffers=True), dict(avg_fn=lambda a,b,n: .9*a+.1*b)], ids=['mean','buffers','ema'])
def test_torch_average(kw):
    m = prune_model(net(), .5)
    ema = AveragedModel(m, **kw)
    class Average(Callback):
        def after_step(self): ema.update_parameters(self.model)
    quiet(learner(m), 1, 1e-1, cbs=Average())
    assert same(masks(ema.module), masks(m)) and abs(sparsity(ema.module)-.5)<1e-9
    assert not torch.equal(ema.module.fc.weight, m.fc.weight) and torch.allclose(ema.module.eval()(XB), by_hand(ema.module, XB), atol=1e-5)

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam])
@pytest.mark.parametrize('pruner', [True,False])
def test_resume(tmp_path, opt_func, pruner):
    "2 + 2 epochs, with a new process's learner in between, are 4 epochs"
    def start(model):
        dls = data()
        dls.train.shuffle = False
        return learner(model, dls, opt_func=opt_func, path=tmp_path)
    def go(learn, n): return quiet(learn, n, 1e-2, cbs=[Holds(), *([Pruner(.5)] if pruner else [])])
    one = go(start(prune_model(net(), .5)), 4)
    go(start(prune_model(net(), .5)), 2).save('middle')
    two = start(mask_model(net())).load('middle')
    go(two, 2)
    assert same(state(one.model), state(two.model)) and n_gone(two.model)==198
    for a,b in zip(one.opt.state_dict()['state'], two.opt.state_dict()['state']):
        assert a.keys()==b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)

def test_compiled():
    "Also one that has run before it was masked"
    def run(model): return quiet(learner(model, opt_func=SGD), 2, .01, cbs=[Pruner(.5, schedule='gradual'), Holds()])
    compiled = torch.compile(net(), backend='eager')
    with torch.no_grad(): before = compiled.eval()(XB)
    learn,plain = run(compiled),run(net())
    assert type(learn.model) is type(compiled) and same(masks(learn.model), masks(plain.model)) and n_gone(learn.model)==198
    with torch.no_grad(): after = learn.model.eval()(XB)
    assert torch.allclose(after, by_hand(plain.model, XB), atol=1e-5) and not torch.allclose(after, before, atol=1e-2)
    prune_model(learn.model, .9)
    with torch.no_grad(): assert torch.allclose(learn.model(XB), by_hand(unwrap(learn.model), XB), atol=1e-5)

@pytest.mark.parametrize('criterion,trained', [('magnitude',True), ('snip',True),
    ('magnitude',False),('snip',False)])
def test_around_training(tmp_path, criterion, trained):
    "Finding a rate, validating and predicting change nothing, and show no column"
    learn = learner(path=tmp_path, cbs=Pruner(.5, criterion))
    if trained: quiet(learn, 1, 1e-3)
    before,opt = state(learn.model),deepcopy(learn.opt and learn.opt.state_dict()['state'])
    with learn.no_bar(),learn.no_logging():
        learn.lr_find(num_it=10, show_plot=False)
        assert same(state(learn.model), before)
        assert len(learn.validate())==2
        assert same(state(learn.model), before)
        assert len(learn.predict(X[0])[2])==10 and len(learn.get_preds()[0])==20
        learn.summary()
    assert same(state(learn.model), before) and n_gone(learn.model)==(198 if trained else 0) and learn.metrics.attrgot('name')==['accuracy']
    if trained: assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for a,b in zip(opt, learn.opt.state_dict()['state']) for k in a)
    quiet(learn, 1, 1e-3)
    assert n_gone(learn.model)==198

@ends
@pytest.mark.parametrize('stays', [False,True])
def test_clean_after_an_end(error, stays):
    learn,pruner = learner(),Pruner(.5)
    if stays: learn.add_cb(pruner)
    try: quiet(learn, 1, 1e-3, cbs=StopAt(error) if stays else [pruner, StopAt(error)])
    except (KeyboardInterrupt,RuntimeError): pass
    assert learn.metrics.attrgot('name')==['accuracy'] and learn._with_events.__func__ is Learner._with_events and n_gone(learn.model)==198
    if stays: learn.remove_cb(pruner)
    quiet(learn, 1, 1e-3, cbs=[Pruner(.7), Holds()])
    assert learn.recorder.metric_names.count('sparsity')==1 and n_gone(learn.model)==decimal_ceil(.7, 396)

@pytest.mark.parametrize('criterion', ['magnitude','random','taylor','prue',
                                       'snip'])
@pytest.mark.parametrize('schedule', ['one_shot','gradual'])
def test_sparsity_0_is_plain_training(criterion, schedule):
    def run(cbs):
        learn = learner(net(.3), data(pad=1))
        random.seed(7); torch.manual_seed(7); np.random.seed(7)
        return quiet(learn, 3, 1e-2, fit='fit_one_cycle', cbs=cbs)
    plain,zero = run(None),run(Pruner(0, criterion, schedule=schedule))
    assert same(state(plain.model), without_masks(state(zero.model))) and n_gone(zero.model)==0
    assert [list(o) for o in plain.recorder.values]==[list(o)[:-1] for o in zero.recorder.values]
    assert plain.recorder.losses==zero.recorder.losses

def test_bias_keeps_its_place_in_the_optimiser():
    "Weight decay is still not for biases, masked or not"
    m = mask_model(net(), {'fc.bias': tensor([0.]*5+[1.]*5), 'norm.weight': tensor([0.,1,1,1])})
    learn = learner(m)
    learn.create_opt()
    assert [learn.opt.state[p].get('do_wd', True) for p in m.parameters()]==[True,False,False,False,True,False]

@pytest.mark.parametrize('criterion', ['snip','taylor'])
@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_scores_do_not_see_mixed_labels(criterion, cb):
    plain,mixed = [],[]
    for seen,cbs in ((plain,[]), (mixed,[cb()])):
        learn = learner(dls=data(bs=1000), cbs=cbs)
        learn.dls.train.shuffle = False
        quiet(learn, 1, 0., cbs=Pruner(lambda worth: (seen.append(worth), .5)[1], criterion))
    assert torch.allclose(all_of(plain[0]), all_of(mixed[0]), rtol=1e-4, atol=1e-8)

@pytest.mark.parametrize('name', ['magnitude','snip'])
def test_two_processes_equal_one(name, two_ranks):
    "SNIP looks at the first process's batch, so there the two equal each other only"
    one,first,second = ddp.train(name),*(o[name] for o in two_ranks)
    n = decimal_ceil(.8, sum(v.numel() for k,v in one.items() if k.endswith('_mask')))
    for k,v in one.items():
        assert torch.equal(first[k], second[k]), k
        if name!='snip': assert torch.allclose(first[k], v, atol=1e-5), k
    assert all(sum(int((v==0).sum()) for v in masks(o).values())==n for o in (one, first, second))


# masks as such

def test_masks_travel():
    m = prune_model(net(), .5)
    before,s = {k: v.clone() for k,v in masks(m).items()},state(m)
    other = mask_model(net())
    other.load_state_dict(s)
    assert same(state(other), s) and same(masks(other), before) and same(masks(s), before)
    for dtype in (torch.half, torch.bfloat16, torch.double):
        m.to(dtype)
        assert m.fc.weight.dtype==m.fc.weight_mask.dtype==dtype and n_gone(m)==198
        assert all(torch.equal(v.float(), before[k]) and (prunable(m)[k][v==0]==0).all() for k,v in masks(m).items())
    m.float().load_state_dict(without_masks(state(net())), strict=False)           # a checkpoint from before
    assert n_gone(m)==198 and torch.equal(m.fc._parameters['weight'], net().fc.weight)
    fold(m)
    assert not masks(m) and type(m.fc) is nn.Linear and abs(sparsity(m)-.5)<1e-9 and m.state_dict().keys()==net().state_dict().keys()
    assert fold(m) is m

def test_new_masks_replace_old_ones():
    m,raw = net(),net().fc.weight.detach()
    ids = [id(p) for p in m.parameters()]
    a = torch.rand(10,36)<.5
    mask_model(m, {'fc.weight': a})
    buffer = m.fc.weight_mask
    assert mask_model(m, {'fc.weight': ~a, 'fc.bias': [0]*5+[1]*5}) is m
    assert m.fc.weight_mask is buffer and torch.equal(m.fc.weight, raw*~a) and m.fc.bias[:5].count_nonzero()==0 and m.fc.bias[5:].count_nonzero()==5
    assert 'conv.weight' not in masks(m) and [id(p) for p in m.parameters()]==ids and type(m.fc).__mro__[2] is nn.Linear
    for _ in range(2):                          # put on, and replaced: the caller's tensor stays the caller's
        mine = torch.zeros(4,1,3,3)
        mask_model(m, {'conv.weight': mine})
        mine.fill_(1)
        assert m.conv.weight.count_nonzero()==0
    mask_model(m, {'fc.weight': torch.ones(10,36)})
    assert torch.equal(m.fc.weight, raw) and isinstance(m, nn.Sequential)

def test_a_network_that_is_one_layer():
    m = prune_model(nn.Linear(10,2), .5)
    assert list(prunable(m))==list(masks(m))==['weight'] and sparsity(m)==.5 and sparsity(deepcopy(m))==.5 and type(fold(m)) is nn.Linear
    assert layer_sparsity(nn.Sequential(m)).loc['total','nonzero']==10

def test_tied_weights():
    "One parameter in two layers is one set of weights"
    m = nn.Sequential(nn.Linear(4,4), nn.ReLU(), nn.Linear(4,4))
    m[2].weight = m[0].weight
    prune_model(m, .33)
    assert torch.equal(m[0].weight, m[2].weight)

def test_parametrized_layers_are_layers_of_their_own():
    m = nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(i,o)) for i,o in ((4,8),(8,2))))
    assert list(layer_sparsity(m).weights)==[32,16,48] and l1(m).item()==pytest.approx(sum(o.weight.abs().sum().item() for o in m))


# what weights are worth

class Small(nn.Module):
    "27 + 36 weights, BatchNorm and dropout, in double precision"
    def __init__(self, drop=.5):
        super().__init__()
        set_seed(3)
        self.conv,self.norm,self.drop,self.fc = nn.Conv2d(1,3,3),nn.BatchNorm2d(3),nn.Dropout(drop),nn.Linear(12,3)
        self.norm.running_mean.uniform_(-.3,.3); self.norm.running_var.uniform_(.5,2); self.norm.weight.data.uniform_(.5,1.5)
        self.double()
    def forward(self, x): return self.fc(self.drop(self.norm(self.conv(x)).relu().flatten(1)))

set_seed(4)
SX,SY = torch.randn(21,1,4,4).double(),torch.arange(21)%3
SY[:2] = 2                                                          # classes of 6, 6 and 9

class SmallDL(TfmdDL):
    def create_item(self, i): return SX[i],SY[i]
def small_dls(bs=7, **kwargs): return DataLoaders(*[SmallDL(range(21), bs=bs, num_workers=0, **kwargs) for _ in range(2)])

@torch.no_grad()
def by_mask(model, value, eps=1e-5, batch_stats=False):
    "`{name of a weight: d value/d m}` at m = 1 for each weight on its own, central differences; `value(model)` may be a tensor"
    model = deepcopy(model).eval()
    norm_of(model).train(batch_stats)
    slopes = {}
    for k in ('conv.weight','fc.weight'):
        w,slope = model.get_parameter(k).data.view(-1),[]
        for j in range(len(w)):
            was,ends = w[j].item(),[]
            for m in (1+eps, 1-eps):
                w[j] = was*m
                ends.append(torch.as_tensor(value(model), dtype=torch.double))
            w[j] = was
            slope.append((ends[0]-ends[1])/(2*eps))
        slopes[k] = torch.stack(slope).reshape(*model.get_parameter(k).shape, *slope[0].shape)
    return slopes

def p_true(model): return torch.stack([z.softmax(0)[c] for z,c in zip(model(SX), SY)])
def means(p): return {c: math.fsum(float(o) for o,k in zip(p, SY.tolist()) if k==c)/SY.tolist().count(c) for c in range(3)}
def delta(model):
    "Wang et al. 2022, eq. 5"
    p,y = p_true(model).tolist(),SY.tolist()
    mean = means(p)
    return sum(math.fsum((o-mean[c])**2 for o,k in zip(p, y) if k==c)/y.count(c) for c in range(3))/3

def slow_prue(model, mode):
    if mode=='paper': return {k: v.abs() for k,v in by_mask(model, delta).items()}
    with torch.no_grad(): p = p_true(deepcopy(model).eval())
    sign = torch.tensor([math.copysign(1, o-means(p)[c]) for o,c in zip(p.tolist(), SY.tolist())]).double()
    return {k: (v@sign).abs() for k,v in by_mask(model, p_true).items()}

def close(a, b, rtol=1e-4):
    "Relative to the largest"
    assert a.keys()==b.keys()
    top = max(float(v.abs().max()) for v in b.values())
    for k in b: assert (a[k].double()-b[k]).abs().max()<rtol*top, k

@pytest.mark.parametrize('p', [1,2,3])
def test_magnitude(p):
    m = Small()
    for by_name in ([scores(m)] if p==1 else []) + [scores(m, partial(magnitude, p=p))]:
        close(by_name, {k: tensor([abs(o) for o in m.get_parameter(k).flatten().tolist()]).double().view(m.get_parameter(k).shape) for k in ('conv.weight','fc.weight')}, 1e-6)

@pytest.mark.parametrize('n', [1,2,3])
@pytest.mark.parametrize('criterion,batch_stats', [('snip',True), ('taylor',False)])
def test_snip_and_taylor(criterion, batch_stats, n):
    m,batches,labels = Small(),[],[]
    hook = m.register_forward_pre_hook(lambda m,args: batches.append(args[0].detach().clone()))
    def loss(z, y): labels.append(y.clone()); return F.cross_entropy(z, y)
    got = scores(m, partial(criteria[criterion], n_batches=n), small_dls(), loss_func=loss)
    hook.remove()
    batches,labels = batches[-n:],labels[-n:]
    assert len(labels)==n and (criterion=='snip' or torch.equal(torch.cat(batches), SX[:7*n]))
    slopes = [by_mask(m, lambda m: F.cross_entropy(m(x), y), batch_stats=batch_stats) for x,y in zip(batches, labels)]
    if criterion=='taylor': expected = {k: sum(o[k]**2 for o in slopes) for k in got}
    else:
        expected = {k: sum(o[k] for o in slopes).abs() for k in got}
        total = sum(o.sum() for o in expected.values())
        expected = {k: o/total for k,o in expected.items()}
    close(got, expected)

@pytest.mark.parametrize('mode', ['paper','code'])
@pytest.mark.parametrize('bs,kw', [(7,{}), (21,{}), (4, dict(shuffle=True)), (4, dict(shuffle=True, drop_last=True))], ids=str)
def test_prue(mode, bs, kw):
    m = Small()
    close(scores(m, partial(prue_worth, mode=mode), small_dls(bs, **kw)), slow_prue(m, mode))

def test_prue_modes_differ():
    paper,code = (slow_prue(Small(), mode) for mode in ('paper','code'))
    assert torch.equal(all_of(scores(Small(), 'prue', small_dls())).argsort(), all_of(paper).argsort())
    assert not torch.equal(all_of(paper).argsort(), all_of(code).argsort())

@pytest.mark.parametrize('criterion', ['prue', 'taylor', partial(prue_worth, mode='code')], ids=['prue','taylor','code'])
def test_scores_see_the_images_as_they_are(criterion):
    "Augmentation and shuffling are not for scores"
    m = net(.5)
    plain = all_of(scores(m, criterion, data(bs=7)))
    assert torch.equal(plain, all_of(scores(m, criterion, data(bs=7, pad=3, flip=True))))
    if criterion!='taylor': assert torch.allclose(plain, all_of(scores(m, criterion, data(bs=1000))), rtol=1e-3, atol=1e-3*plain.max())

DRIVEN = pytest.mark.parametrize('criterion', ['snip','taylor','prue'])

@DRIVEN
def test_scoring_leaves_no_trace(criterion):
    m,dls = net(.5).train(),data(bs=1000)
    m.norm.eval(); m.conv.weight.requires_grad_(False)
    m.fc.weight.grad = torch.full_like(m.fc.weight, 3.)
    free = net(.5).train()
    before,modes = state(m),[o.training for o in m.modules()]
    first,second,unfrozen = (scores(o, criterion, dls) for o in (m, m, free))
    for o in (second, unfrozen): assert torch.allclose(all_of(first), all_of(o), rtol=1e-4, atol=1e-7)     # frozen or not, and dropout is off
    assert all_of(first).max()>0 and first['conv.weight'].abs().max()>0
    def untouched():
        assert same(state(m), before) and [o.training for o in m.modules()]==modes and m.norm.track_running_stats
        assert [p.requires_grad for p in m.parameters()]==[False]+[True]*5
        assert (m.fc.weight.grad==3).all() and all(p.grad is None for k,p in m.named_parameters() if k!='fc.weight')
    untouched()
    def boom(*args): raise RuntimeError('boom')
    if criterion!='prue':
        with pytest.raises(RuntimeError, match='boom'): scores(m, criterion, dls, loss_func=boom)
        untouched()

@DRIVEN
def test_masked_weights_are_worth_nothing(criterion):
    "A masked network is scored as the plain network with zeros"
    m,dls = prune_model(net(), .5),data(bs=1000)
    masked,plain = (scores(o, criterion, dls) for o in (m, fold(deepcopy(m))))
    for k,mask in masks(m).items():
        assert masked[k][mask==0].isneginf().all() and plain[k][mask==0].count_nonzero()==0
        assert torch.allclose(masked[k][mask==1], plain[k][mask==1], rtol=1e-3, atol=1e-7)

@DRIVEN
def test_scores_of_plain_fastai_data(criterion):
    "Per item, with a network of two inputs"
    learn = Learner(per_item(), Two(), loss_func=CrossEntropyLossFlat())
    assert n_gone(quiet(learn, 2, 1e-3, cbs=Pruner(.5, criterion)).model)==3

def test_a_criterion_of_one_s_own():
    m = prune_model(net(), .25, lambda s: {k: torch.arange(w.numel(), 0., -1).view(w.shape) for k,w in s.weights.items()}, ignore='conv')
    assert masks(m)['fc.weight'].flatten().tolist()==[1.]*270+[0.]*90
    worth = scores(net(), 'random')
    assert same(worth, scores(net(), 'random')) and 0<=all_of(worth).min()<all_of(worth).max()<1
    asked = []
    prune_model(m := net(), lambda worth: asked.append(sum(v.numel() for v in worth.values())) or .1)
    assert asked==[396] and n_gone(m)==40


# n:m patterns

@pytest.mark.parametrize('pattern', ['2:4','1:4','1:2','3:8'])
def test_patterns(pattern):
    n,m = map(int, pattern.split(':'))
    set_seed(0)
    model = nn.Sequential(nn.Conv2d(8,3,(2,3)), nn.Conv2d(6,5,3), nn.Linear(16,4), nn.Linear(7,3), nn.Conv1d(16,2,3), nn.Conv2d(8,8,3,groups=8), nn.ConvTranspose2d(8,8,3))
    prune_model(model, pattern=pattern)
    assert not masks(model[-1])
    for o in model[:-1]:
        w = o._parameters['weight'].detach().flatten(2) if o._parameters['weight'].ndim>2 else o._parameters['weight'].detach()[...,None]
        if w.shape[1] % m: assert not masks(o); continue
        got = masks(o)['weight'].reshape(w.shape)
        for i in range(w.shape[0]):
            for j in range(w.shape[2]):
                for k in range(0, w.shape[1], m):
                    best = sorted(range(m), key=lambda c: -abs(w[i,k+c,j].item()))[:n]
                    assert [c for c in range(m) if got[i,k+c,j]]==sorted(best)
    assert masks(model).keys()>={'0.weight','2.weight','4.weight'}-({'0.weight'} if 8%m else set())

def test_patterns_while_training():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.ReLU(), nn.Linear(16,10))
    mask_model(model, {'1.weight': torch.arange(64).expand(16,64)>2})
    learn = quiet(learner(model), 1, 1e-2, cbs=[Pruner(pattern='2:4'), Holds()])
    assert [sparsity(model[1]),sparsity(model[3])]==[33/64,.5] and (model[1].weight[:,:3]==0).all()


# penalties

def slow_penalty(name, model):
    ws = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d,nn.Linear))]
    g = [float(o) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for o in m.weight.tolist()]
    mean = math.fsum(g)/len(g)
    return dict(l1=lambda: math.fsum(abs(o) for w in ws for o in w.flatten().tolist()), slimming=lambda: math.fsum(map(abs, g)),
                group_lasso=lambda: math.fsum(math.sqrt(f.numel())*math.sqrt(math.fsum(o**2 for o in f.flatten().tolist())) for w in ws for f in w),
                polarization=lambda: 1.2*math.fsum(map(abs, g)) - math.fsum(abs(o-mean) for o in g))[name]()

def two_norms():
    "BatchNorms with different means: one global mean is another number than one each"
    m = nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4,3,3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48,10)).double()
    m[1].weight.data = tensor([.1,-.2,.3,.4]).double(); m[4].weight.data = tensor([.9,1.1,1.]).double()
    return m

@pytest.mark.parametrize('name', penalties)
def test_penalties(name):
    set_seed(2)
    m = two_norms()
    assert abs(penalties[name](m).item()-slow_penalty(name, m))<1e-9
    penalties[name](m).backward()
    for p in (p for p in m.parameters() if p.grad is not None):
        for j in range(0, p.numel(), 7):
            was,ends = p.data.view(-1)[j].item(),[]
            for e in (1e-6, -1e-6):
                p.data.view(-1)[j] = was+e
                ends.append(slow_penalty(name, m))
            p.data.view(-1)[j] = was
            assert abs((ends[0]-ends[1])/2e-6 - p.grad.view(-1)[j].item())<1e-5

def test_group_lasso_of_a_transposed_convolution():
    "Groups are outputs: of the 6, three are made from each half of the 4 inputs"
    m = nn.ConvTranspose2d(4, 6, 2, groups=2)
    w = m.weight.detach()
    want = sum(w[2*g:2*g+2,i].numel()**.5 * w[2*g:2*g+2,i].norm() for g in range(2) for i in range(3))
    assert torch.allclose(penalties['group_lasso'](m), want)

def test_group_lasso_of_a_pruned_row():
    m = mask_model(nn.Linear(4,3), {'weight': tensor([[0,0,0,0], [1,1,0,0], [1,1,1,1]])})
    penalties['group_lasso'](m).backward()
    assert m._parameters['weight'].grad.isfinite().all() and m._parameters['weight'].grad[0].count_nonzero()==0

def test_slimming_adds_the_sign():
    grads = {}
    class Grads(Callback):
        def before_step(self): grads.setdefault(key, norm_of(self.model).weight.grad.clone())
    for key,cbs in (('plain',[]), ('slim',[Penalty('slimming', 1e-2)])):
        m = net()
        m.norm.weight.data = tensor([.5,-.5,1.,-2.])
        quiet(learner(m), 1, 1e-3, cbs=[*cbs, Grads()])
    assert torch.allclose(grads['slim']-grads['plain'], 1e-2*tensor([1.,-1,1,-1]), atol=1e-6)

@pytest.mark.parametrize('name', penalties)
def test_penalty_in_training(name):
    seen,m = [],net()
    m.norm.weight.data = tensor([-.5,.3,1.4,.9])
    class Look(Callback):
        order = 100
        def after_step(self): seen.append(norm_of(self.model).weight.detach().clone())
    learn = learner(m)
    start = slow_penalty(name, m)
    quiet(learn, 1, 1e-2, cbs=[Penalty(name, 1e-2), Look()])
    inside = all(((o>=0)&(o<=1)).all() for o in seen)
    assert len(seen)==3 and inside==(name=='polarization') and learn.recorder.metric_names[-1]!='accuracy'
    assert 0<learn.recorder.values[-1][-1]<2*start

@pytest.mark.parametrize('name', penalties)
def test_weight_0_is_plain_training(name):
    def run(cbs):
        m = net(.3)
        m.norm.weight.data = tensor([-.5,.3,1.4,.9])
        return quiet(learner(m), 2, 1e-2, cbs=cbs)
    plain,zero = run(None),run(Penalty(name, 0))
    assert same(state(plain.model), state(zero.model)) and plain.recorder.losses==zero.recorder.losses


# prune, train, repeat

def quietly_iterative(learn, *args, **kwargs):
    with learn.no_bar(),learn.no_logging(): return iterative_prune(learn, *args, **kwargs)

class Watch(Callback):
    "Network, optimiser and masks as each training begins, as epoch `k` ends, and the learning rates of the steps"
    order = 100
    def __init__(self, k=0): self.k,self.rounds,self.fresh = k,[],False
    def before_fit(self):
        if not hasattr(self.learn, 'gather_preds'): self.fresh = True
    def note(self): return SimpleNamespace(model=state(self.model), opt=deepcopy(self.opt.state_dict()), lrs=[], gone=n_gone(self.model), kept=None)
    def before_batch(self):
        if not self.training: return
        if self.fresh: self.fresh = False; self.rounds.append(self.note())
        self.rounds[-1].lrs.append(self.opt.hypers[-1]['lr'])
    def after_epoch(self):
        if self.epoch+1==self.k and self.rounds and self.rounds[-1].kept is None: self.rounds[-1].kept = self.note()

def same_opt(a, b):
    return len(a['state'])==len(b['state']) and all(x.keys()==y.keys() and all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in x)
                                                    for x,y in zip(a['state'], b['state']))

@pytest.mark.parametrize('k', [0,1,2])
@pytest.mark.parametrize('opt_func', [Adam, partial(SGD, mom=.9)])
def test_rewinding_weights(k, opt_func):
    watch,learn = Watch(k),learner(net(.2), opt_func=opt_func)
    before = state(learn.model)
    levels = quietly_iterative(learn, .5, rewind='weights', rewind_to=k, n_epoch=3, lr=1e-2, cbs=watch)
    dense,*rounds = watch.rounds
    then = dense.kept if k else dense
    assert len(rounds)==len(levels)-1==4 and (k or same(dense.model, before)) and not same(then.model, state(learn.model))
    for o,level in zip(rounds, levels[1:]):
        assert part_of(then.model, o.model) and o.model.keys()-then.model.keys()=={'conv.weight_mask','fc.weight_mask'}
        assert same_opt(o.opt, then.opt) and o.gone==396-level.weights
        assert o.lrs==dense.lrs[3*k:] and len(o.lrs)==9-3*k
    assert [o.gone for o in rounds]==[80,144,195,198]
    assert learn.recorder.hps['lr']==dense.lrs[3*k:]

@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.Adam)])
@pytest.mark.parametrize('k', [0,1])
def test_rewinding_beside_a_term_with_parameters(k, opt_func):
    learn,kd = learner(opt_func=opt_func),KnowledgeDistillation(net(), FitNet({'conv': 'conv'}))
    levels = quietly_iterative(learn, .3, rewind='weights', rewind_to=k, n_epoch=2, lr=1e-2, cbs=kd)
    assert [396-o.weights for o in levels]==[0,80,119] and not hasattr(learn.model, 'distill_heads')

@pytest.mark.parametrize('rewind', ['lr','finetune'])
def test_keeping_weights(rewind):
    watch,learn = Watch(),learner(net(.2))
    quiet(learn, 2, 1e-2, fit='fit_one_cycle', cbs=watch)
    dense,last = watch.rounds.pop(),learn.opt.hypers[-1]['lr']
    levels = quietly_iterative(learn, .5, rewind=rewind, n_epoch=2, lr=1e-2 if rewind=='lr' else None, cbs=watch)
    for o,level,after in zip(watch.rounds, levels, levels[1:]):
        assert same(without_masks(o.model), without_masks(state(level.model))) and o.gone==396-after.weights      # goes on where it stood
        assert bool(o.opt['state'][0].get('grad_avg') is None)==(rewind=='lr')
        assert o.lrs==(dense.lrs if rewind=='lr' else [last]*6)
    assert len(watch.rounds)==4 and same(state(learn.model), state(levels[-1].model))

def test_finetuning_keeps_the_rate_of_every_group():
    learn = learner(splitter=lambda m: [[*m.conv.parameters(), *m.norm.parameters()], list(m.fc.parameters())])
    quiet(learn, 1, slice(1e-4,1e-2))
    quietly_iterative(learn, .2, rewind='finetune', n_epoch=1)
    assert [h['lr'] for h in learn.opt.hypers]==[1e-4,1e-2]

def test_levels_are_copies():
    learn = quiet(learner(), 2, 1e-2)
    levels = quietly_iterative(learn, .5, n_epoch=1, lr=1e-2)
    tensors = [id(o) for l in levels for o in (*l.model.parameters(), *l.model.buffers())] + [id(o) for o in learn.model.parameters()]
    assert len(tensors)==len(set(tensors)) and not hasattr(levels[-1].model, '_orig_mod')
    for o in levels:
        right = (o.model.eval()(torch.cat([x for x,_ in learn.dls.valid]))).argmax(1)==torch.cat([y for _,y in learn.dls.valid])
        assert abs(right.float().mean().item()-o.metrics['accuracy'])<1e-6 and abs(o.sparsity-sparsity(o.model))<1e-9
        assert o.weights==sum(int((w!=0).sum()) for w in prunable(o.model).values())
    assert list(levels.curve)==['sparsity','weights','valid_loss','accuracy'] and len(levels.curve)==5
    find_breakpoint(levels.curve)

def test_iterative_prune_goes_on_from_a_pruned_network():
    learn = learner(prune_model(net(), .36))
    assert [396-o.weights for o in quietly_iterative(learn, .5, n_epoch=1, lr=1e-3)]==[143,194,198]
    assert len(quietly_iterative(learn, .3, n_epoch=1, lr=1e-3))==1

def test_iterative_prune_passes_on_what_it_is_given():
    fits = []
    class Count(Callback):
        def before_fit(self): fits.append(self.n_epoch) if not hasattr(self.learn, 'gather_preds') else None
    levels = quietly_iterative(learner(), .5, .3, n_epoch=1, lr=1e-3, fit='fit_flat_cos', cbs=Count(), criterion='snip', scope='layer', ignore='conv')
    assert len(levels)==3 and levels[-1].weights==216 and fits==[1,1] and masks(levels[-1].model).keys()=={'fc.weight'}


# what is refused

def empty_learner(tmp_path):
    learner(path=tmp_path).export('m.pkl')
    return load_learner(tmp_path/'m.pkl')

@pytest.mark.parametrize('message,f', [
    ('sparsity is 50, expected a fraction between 0 and 1: for 50 % write 0.5', lambda: prune_model(net(), 50)),
    ('sparsity is -0.1, expected a fraction', lambda: prune_model(net(), -.1)),
    ('sparsity is 50', lambda: Pruner(50)), ('sparsity is True', lambda: Pruner(True)), ("sparsity is '.5'", lambda: prune_model(net(), '.5')),
    ('sparsity is nan', lambda: prune_model(net(), float('nan'))), ('sparsity is 79', lambda: iterative_prune(learner(), 79)),
    ('sparsity is 7, expected', lambda: prune_model(net(), lambda worth: 7)),
    ('rate is 20', lambda: iterative_prune(learner(), .5, 20)), ('rate is 0', lambda: iterative_prune(learner(), .5, 0)), ('rate is 3', lambda: prune_model(net(), .5, rate=3)),
    ("criterion is 'magnitud', expected one of magnitude, random, snip", lambda: prune_model(net(), .5, 'magnitud')),
    ("Did you mean 'magnitude'?", lambda: scores(net(), 'magnitud')),
    ("has no layer 'fcc'. The nearest names are 'fc'", lambda: prune_model(net(), .5, ignore='fcc')),
    ("has no layer 'fcc'", lambda: mask_model(net(), {'fcc.weight': torch.ones(10,36)})),
    ("'norm.running_mean' is no weight or bias", lambda: mask_model(net(), {'norm.running_mean': torch.ones(4)})),
    ('has no linear or convolution layer to prune', lambda: prune_model(nn.BatchNorm1d(3))),
    ('besides those that `ignore` names', lambda: prune_model(net(), ignore=('conv','fc'))),
    ('the mask of fc.weight has shape (36, 10), expected (10, 36)', lambda: mask_model(net(), {'fc.weight': torch.ones(36,10)})),
    ('the mask of fc.weight holds other numbers than 0 and 1', lambda: mask_model(net(), {'fc.weight': torch.rand(10,36)})),
    ('holds other numbers than 0 and 1', lambda: mask_model(net(), {'fc.weight': torch.full((10,36), float('nan'))})),
    ("schedule is 'linear', expected one of one_shot, gradual, iterative", lambda: Pruner(.5, schedule='linear')),
    ('start and end are 0.6 and 0.5', lambda: Pruner(.5, start=.6)), ('expected fractions of training', lambda: Pruner(.5, end=1.)),
    ('prunes once', lambda: Pruner(pattern='2:4', schedule='gradual')), ('prunes once', lambda: Pruner(lambda w: .5, schedule='iterative')),
    ("pattern is '4', expected 'n:m'", lambda: prune_model(net(), pattern='4')), ("pattern is '4:2'", lambda: prune_model(net(), pattern='4:2')),
    ("pattern is (2, 4)", lambda: prune_model(net(), pattern=(2,4))),
            ("pattern is '4'", lambda: Pruner(pattern='4')), ("criterion is 'snap'", lambda: Pruner(.5, 'snap')), ("scope is 'all'", lambda: Pruner(.5, scope='all')),
        ("by is 'filter'", lambda: Pruner(.5, by='filter')),
    ("by is 'filter'", lambda: prune_model(net(), by='filter')), ("scope is 'all'", lambda: prune_model(net(), scope='all')),
    ('this criterion needs training data', lambda: prune_model(net(), .5, 'snip')), ('this criterion needs training data', lambda: scores(net(), 'prue', data=XB)),
    ("mode is 'papers'", lambda: scores(net(), partial(prue_worth, mode='papers'), data())),
    ("'bn_scale' scores channels", lambda: prune_model(net(), .5, 'bn_scale')), ("'group_lasso' scores channels", lambda: prune_model(net(), .5, 'group_lasso')),
    ("rewind is 'weight'", lambda: iterative_prune(learner(), .5, rewind='weight')),
    ('rewind_to is 10, expected an epoch before 10', lambda: iterative_prune(learner(), .5, rewind='weights', rewind_to=10)),
    ('this learner has none', lambda: iterative_prune(learner(), .5, rewind='finetune')),
    ("penalty is 'l3', expected one of l1", lambda: Penalty('l3')), ('weight of', lambda: Penalty('l1', -1)),
    ('has no BatchNorm with a scale', lambda: penalties['slimming'](nn.Linear(2,2))),
])
def test_bad_input(message, f):
    with pytest.raises(ValueError) as e: f()
    assert message in str(e.value)

def test_bad_networks(tmp_path):
    for criterion in ('snip','taylor','prue'):
        with pytest.raises(ValueError, match='this criterion needs training data'): prune_model(empty_learner(tmp_path), .5, criterion)
    m = net()
    m.fc.weight.data[0,0] = float('nan')
    with pytest.raises(ValueError, match='scores of fc.weight are not all finite'): prune_model(m)
    assert not masks(m)                          # nothing was done halfway

def test_all_masks_or_none():
    with pytest.raises(ValueError): mask_model(m := net(), {'conv.weight': torch.zeros(4,1,3,3), 'fc.weight': torch.rand(10,36)})
    assert not masks(m) and type(m.conv) is nn.Conv2d


# channels

def by_channel(m, *args, **kwargs): return prune_model(m, *args, by='channel', data=data(), **kwargs)
def gone_channels(m): return [i for i in range(4) if (m.conv.weight[i]==0).all()]

@pytest.mark.parametrize('s,n', [(0,0), (.01,1), (.25,1), (.5,2), (.51,3), (.75,3)])
def test_a_channel_leaves_no_trace(s, n):
    m,plain = net().eval(),net().eval()
    for o in (m,plain): nn.init.ones_(o.norm.bias)
    plain.norm.running_mean.uniform_(-1, 1); m.norm.running_mean.copy_(plain.norm.running_mean)
    size = plain.conv.weight.detach().abs().sum((1,2,3))
    by_channel(m, s)
    gone = gone_channels(m)
    assert gone==sorted(size.argsort()[:n].tolist())
    for i in range(4):
        traces = (m.conv.weight[i], m.conv.bias[i], m.norm.weight[i], m.norm.bias[i], m.fc.weight[:,9*i:9*i+9])
        assert all((o==0).all() if i in gone else (o!=0).all() for o in traces)
    h = plain.norm(plain.conv(XB)).relu()
    h[:,gone] = 0
    assert torch.allclose(m(XB), plain.fc(h.flatten(1)), atol=1e-5)
    small = shrink(fold(deepcopy(m)), data())
    assert torch.allclose(small(XB), m(XB), atol=1e-5) and small.conv.out_channels==4-n

def test_pruned_channels_stay():
    "In training, with weight decay and momentum, and when more go"
    learn = learner(net(.2), opt_func=partial(SGD, mom=.9), wd=.1)
    quiet(learn, 3, 1e-2, cbs=[Pruner(.5, by='channel', start=.34), Holds()])
    first = gone_channels(learn.model)
    assert len(first)==2
    quiet(learn, 2, 1e-2, cbs=[Pruner(.75, by='channel', schedule='gradual'), Holds()])
    assert len(gone_channels(learn.model))==3 and set(first)<set(gone_channels(learn.model))
    m = learn.model.eval()
    assert torch.allclose(shrink(fold(deepcopy(m)), learn.dls)(XB), m(XB), atol=1e-5)

def test_masked_weights_stay_when_channels_go():
    m = prune_model(net(), .3)
    before = {k: v.clone() for k,v in masks(m).items()}
    by_channel(m, .5)
    assert all((masks(m)[k][v==0]==0).all() for k,v in before.items()) and len(gone_channels(m))==2

def test_sparsity_0_by_channel_is_plain_training():
    def run(cbs): return quiet(learner(net(.3)), 2, 1e-2, fit='fit_one_cycle', cbs=cbs)
    plain,zero = run(None),run(Pruner(0, by='channel'))
    assert same(state(plain.model), without_masks(state(zero.model))) and plain.recorder.losses==zero.recorder.losses

def test_no_layer_is_emptied():
    with pytest.warns(UserWarning, match='would empty'): m = by_channel(net(), 1.)
    assert len(gone_channels(m))==3

class Tied(nn.Module):
    "Tokens of an image's pixels, whose embedding is the output layer too"
    def __init__(self): super().__init__(); self.emb,self.out = nn.Embedding(10,8),nn.Linear(8,10,bias=False); self.out.weight = self.emb.weight
    def forward(self, x): return self.out(self.emb(x.flatten(1).abs().long().clamp(max=9)).mean(1))

@pytest.mark.parametrize('by,make', [('channel', lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.PReLU(16), nn.Linear(16,10))), ('weight', Tied)])
def test_masked_layers_without_a_bias_train(by, make):
    learn = learner(make())
    for s in (.3,.5): quiet(learn, 1, 1e-2, cbs=Pruner(s, by=by))
    prune_model(learn, .6, by=by)
    assert any(isinstance(o, Masked) and not isinstance(o, nn.Linear) for o in learn.model.modules())
    quiet(learn, 1, 1e-2, reset_opt=True)
    if by=='weight': assert sparsity(learn.model)==.6
    else: assert learn.shrink()[1].out_features==6

@pytest.mark.parametrize('groups', [1,2,8])
def test_worth_of_transposed_channels(groups):
    m = nn.Sequential(nn.Conv2d(1,8,3), nn.ReLU(), nn.ConvTranspose2d(8,8,2,2,groups=groups), nn.ReLU(), nn.Conv2d(8,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    w,size = m[2].weight.detach(),torch.zeros(8)
    for i,o in itertools.product(range(8), range(8//groups)): size[i//(8//groups)*(8//groups)+o] += w[i,o].abs().sum()
    assert torch.allclose(Scoring(m, data(), 'channel')._by_output('2', w.abs()), size)
    small = shrink(by_channel(m, .5), data())
    assert small[2].weight.numel()==16*4//min(groups, 4) and torch.allclose(small.eval()(XB), m.eval()(XB), atol=1e-5)

@pytest.mark.parametrize('criterion', ['magnitude','bn_scale','group_lasso','snip','taylor','prue'])
def test_worth_of_channels(criterion):
    m,dls = Small(),small_dls(21)
    got, = scores(m, criterion, dls, by='channel').values()
    w = m.conv.weight.detach()
    def summed(slopes): return slopes['conv.weight'].sum((1,2,3))
    ce = lambda m: F.cross_entropy(m(SX), SY)
    expected = dict(magnitude=lambda: w.abs().sum((1,2,3)), bn_scale=lambda: m.norm.weight.detach().abs(), group_lasso=lambda: 3*w.pow(2).sum((1,2,3)).sqrt(),
                    snip=lambda: (o := summed(by_mask(m, ce, batch_stats=True)).abs())/o.sum(), taylor=lambda: summed(by_mask(m, ce))**2,
                    prue=lambda: summed(by_mask(m, delta)).abs())[criterion]()
    close({'': got}, {'': expected}, 1e-3)

@pytest.mark.parametrize('message,f', [
    ('a pattern is one of weights', lambda: by_channel(net(), pattern='2:4')), ('Pass `data`', lambda: prune_model(net(), by='channel')),
    ('has no channels that can be removed', lambda: prune_model(nn.Sequential(nn.Flatten(), nn.Linear(64,10)), by='channel', data=data())),
    ('has no channels that can be removed', lambda: by_channel(net(), ignore='conv')),
    ('pass no BatchNorm', lambda: prune_model(nn.Sequential(nn.Conv2d(1,4,3), nn.Flatten(), nn.Linear(144,10)), .5, 'bn_scale', data(), by='channel'))])
def test_bad_channels(message, f):
    with pytest.raises(ValueError) as e: f()
    assert message in str(e.value)


# real MNIST

@pytest.fixture(scope='module')
def mnist_learners():
    "LeNet-300-100 after five epochs of 20,000 images, two seeds"
    if not os.environ.get('KDNB_DATA'): pytest.skip('no image files: set KDNB_DATA to the folder that holds MNIST/')
    def trained(seed):
        set_seed(seed, reproducible=True)
        learn = Learner(image_dls('mnist', bs=256, n_per_class=2000), lenet300(), metrics=accuracy, opt_func=fused_adam)
        return quiet(learn, 5, 4e-3, fit='fit_one_cycle')
    return [trained(seed) for seed in range(2)]

@pytest.mark.long
@pytest.mark.mnist
def test_prue_softens_a_teacher(data_dir, mnist_learners):
    for learn in mnist_learners:
        pruned = prune_model(deepcopy(learn.model), .5, 'prue', learn.dls)
        assert uncertainty(pruned, learn.dls.train) > 1.1*uncertainty(learn.model, learn.dls.train)

@pytest.mark.long
@pytest.mark.mnist
def test_rewinding_the_rate_keeps_the_accuracy(data_dir, mnist_learners):
    "79 % of the weights in seven rounds, each with a schedule of its own"
    learn = mnist_learners[0]
    dense = accuracy_on(learn.model, learn.dls.test)
    levels = quietly_iterative(learn, .79, n_epoch=2, lr=4e-3)
    assert len(levels)==8 and levels[-1].weights==266_200-math.ceil(.79*266_200)
    assert dense-accuracy_on(learn.model, learn.dls.test) < .002

@pytest.mark.parametrize('rewind', ['lr','weights'])
def test_iterative_prune_ends_beside_a_distillation_with_heads(rewind):
    "The heads are no weights of the network: they are not counted, and not pruned"
    learn = learner()
    whole = sum(w.numel() for w in prunable(learn.model).values())
    teacher = net()
    learn.add_cb(KnowledgeDistillation(teacher, KD() + VID('act')))
    levels = quietly_iterative(learn, .5, .3, n_epoch=1, lr=1e-3, rewind=rewind)
    assert levels[0].weights==whole and levels[-1].weights==whole-n_of(.5, whole) and levels[-1].sparsity==pytest.approx(.5, abs=1/whole)

def test_a_round_that_prunes_nothing_is_an_error(monkeypatch):
    from kdnb.prune import rewind
    monkeypatch.setattr(rewind, '_cut_units', lambda s, *args, **kwargs: s.model)
    with pytest.raises(ValueError, match='this round has pruned nothing'): quietly_iterative(learner(), .5, n_epoch=1, lr=1e-3)

@pytest.mark.parametrize('name', penalties)
def test_a_penalty_leaves_heads_alone(name):
    class Look(Callback):
        order = 200
        def after_backward(self): self.grads = {k: p.grad for k,p in self.model.named_parameters() if k.startswith('distill_heads') and p.grad is not None}
    def weights(*cbs):
        learn = quiet(learner(), 1, 1e-2, cbs=[*cbs, Penalty(name, 1e-2), look := Look()])
        return state(learn.model),look.grads
    plain,_ = weights()
    beside,grads = weights(KnowledgeDistillation(net(), VID('act')*0.))
    assert same(plain, beside) and not any(g.abs().sum() for g in grads.values())
