"What is promised of every criterion, whoever wrote it"
from copy import deepcopy
from functools import partial
import pytest, torch
from torch import nn
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.all import accuracy
from kdnb.all import *
from kdnb.prune.criteria import check_criterion

BY = {k: [f.by] if f.by else ['weight','channel'] for k,f in criteria.items()}
PAIRS = [(k,by) for k,ways in BY.items() for by in ways]

class Residual(nn.Module):
    "Channels that a sum ties together, and a linear layer that reads each of them at several places"
    def __init__(self):
        super().__init__()
        self.stem,self.bn = nn.Conv2d(1, 6, 3, padding=1),nn.BatchNorm2d(6)
        self.inner,self.bn2 = nn.Conv2d(6, 6, 3, padding=1),nn.BatchNorm2d(6)
        self.pool,self.drop,self.head = nn.AdaptiveAvgPool2d(2),nn.Dropout(.5),nn.Linear(24, 10)
    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.head(self.drop(self.pool((x+self.bn2(self.inner(x))).relu()).flatten(1)))

@pytest.fixture(scope='module')
def dls(): return image_dls(n_per_class=8, bs=16, device='cpu')

@pytest.fixture
def learn(dls):
    set_seed(0)
    learn = Learner(dls, Residual(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    return learn

def of(name, learn):
    "The criterion `name`, with what it needs"
    if name!='magnitude_increase': return name
    return partial(magnitude_increase, start={k: v/2 for k,v in learn.model.state_dict().items()})

@pytest.mark.parametrize('name, by', PAIRS)
def test_looks_and_leaves_all_as_it_was(name, by, learn):
    learn.model.train()
    learn.model.head.weight.requires_grad_(False)
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    state = torch.get_rng_state()
    worth = scores(learn, of(name, learn), by=by)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(v.equal(before[k]) for k,v in learn.model.state_dict().items())
    assert all(m.training for m in learn.model.modules())
    assert [k for k,p in learn.model.named_parameters() if not p.requires_grad]==['head.weight']
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    assert all(p.grad is None or not p.grad.is_sparse for p in learn.model.parameters())
    assert all(v.isfinite().all() and not v.requires_grad for v in worth.values())
    again = scores(learn, of(name, learn), by=by)
    assert all(v.equal(again[k]) for k,v in worth.items())

@pytest.mark.parametrize('name, by', PAIRS)
def test_what_is_pruned_goes_first_and_stays_pruned(name, by, learn):
    first = scores(learn, of(name, learn), by=by)
    prune_model(learn, .3, of(name, learn), by=by, scope='layer')
    second = scores(learn, of(name, learn), by=by)
    gone = {k: v==-torch.inf for k,v in second.items()}
    assert any(v.any() for v in gone.values())
    for k,v in first.items(): assert v[gone[k]].max()<=v[~gone[k]].min() if gone[k].any() else True
    before = {k: v==0 for k,v in masks(learn.model).items()}
    prune_model(learn, .6, of(name, learn), by=by, scope='layer')
    assert all((m==0)[before[k]].all() for k,m in masks(learn.model).items() if k in before)

@pytest.mark.parametrize('name', ['synflow','grasp','fisher','fpgm','lamp','taylor'])
def test_float64_is_the_reference(name, learn, dls):
    "Scores of a network in float32 are those of the same network in float64, but for rounding"
    by = BY[name][0]
    class Double(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): return self.net(x.double())
    double = Double(deepcopy(learn.model).double())
    exact = scores(double, name, dls, by=by)
    for k,v in scores(learn, name, by=by).items():
        w = exact[f'net.{k}']
        assert (v.double()-w).abs().max()<=1e-3*w.abs().max()

def test_synflow_keeps_the_flow():
    "As much flows through each layer; after every small cut again (theorem 2 of Tanaka et al. 2020)"
    set_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)).double()
    x = torch.randn(2, 1, 8, 8).double()
    for sparsity in (0,.3,.6):
        if sparsity: prune_model(net, sparsity, 'synflow', data=x)
        flows = [v[v>-torch.inf].sum() for v in scores(net, 'synflow', x).values()]
        torch.testing.assert_close(flows, flows[:1]*3, rtol=1e-10, atol=0)

def test_wanda_takes_as_much_of_each_output(learn):
    prune_model(learn, .5, 'wanda')
    for m in masks(learn.model).values(): assert (m.flatten(1).mean(1)-.5).abs().max()<=1/m[0].numel()

def test_fpgm_finds_the_filter_that_another_can_replace(learn, dls):
    w = learn.model.stem.weight.data
    w[1] = w[0]
    learn.model.inner.weight.data[1] = learn.model.inner.weight.data[0]
    w[2:] *= 3
    assert scores(learn, 'fpgm', by='channel')['stem'].argsort()[:2].sort().values.tolist()==[0,1]
