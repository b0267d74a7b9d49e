"What a network loses when a part goes: the numbers of masks set by hand, coupled layers as one, nothing disturbed, nothing done twice."
import random

import pytest
from common import Two, data, per_item, quiet, same, seeded, state
from kdnb.all import *
from kdnb.prune import sensitivity as module

LEVELS = .3,.75

class Grouped(nn.Module):
    "A grouped convolution, which must lose as many channels from each of its two blocks"
    def __init__(self):
        super().__init__()
        self.a,self.bn,self.b,self.fc = nn.Conv2d(1,8,3),nn.BatchNorm2d(8),nn.Conv2d(8,6,3,groups=2),nn.Linear(6,10)
    def forward(self, x): return self.fc(F.relu(self.b(F.relu(self.bn(self.a(x))))).mean((2,3)))

@pytest.fixture
def learn():
    dls = data()
    return quiet(seeded(dls, create('resnet8', dls)), 2, 5e-3)

def row(df, part, level): return df[(df[df.columns[0]]==part) & (df.level==level)].iloc[0]

def by_masks(learn, g, n):
    "Accuracy with the `n` smallest channels of group `g` masked in all layers that make them"
    model = deepcopy(learn.model)
    worth = sum(model.get_submodule(p.path).weight.detach().double().abs().flatten(1).sum(1) for p in g.makers)
    keep = torch.ones(g.n, dtype=torch.bool)
    keep[worth.argsort()[:n]] = False
    mask_model(model, channel_masks(model, {g.name: keep}, [g]))
    return accuracy_on(model, learn.dls.valid)

def test_a_group_goes_as_one(learn):
    df,groups = sensitivity(learn, levels=LEVELS, cache=False),channel_groups(learn.model, learn.dls)
    assert list(df.columns)==['group','level','gone','left','valid_loss','accuracy']
    assert [*dict.fromkeys(df.group)]==[g.name for g in groups if not g.stays]
    for g in groups:
        if g.stays: continue
        for level in (0,*LEVELS):
            o = row(df, g.name, level)
            assert (o.gone,o.left)==(math.ceil(level*g.n), g.n-math.ceil(level*g.n))
            assert o.accuracy==pytest.approx(by_masks(learn, g, o.gone), abs=1e-6)

def test_single_weights_of_a_layer(learn):
    df = sensitivity(learn, by='layer', levels=LEVELS, cache=False)
    assert [*dict.fromkeys(df.layer)]==[p for p,m in learn.model.named_modules() if isinstance(m, (nn.Conv2d,nn.Linear))]
    for path in ('conv1','layer3.0.conv2','fc'):
        for level in LEVELS:
            model = deepcopy(learn.model)
            w = model.get_submodule(path).weight.data
            w.view(-1)[w.abs().view(-1).argsort()[:math.ceil(level*w.numel())]] = 0
            assert row(df, path, level).accuracy==pytest.approx(accuracy_on(model, learn.dls.valid), abs=1e-6)
            assert row(df, path, level).left==w.count_nonzero()

def test_blocks_lose_as_many_each():
    dls = data()
    learn = seeded(dls, Grouped())
    worth = torch.arange(8.)
    for n in (2,4,6):
        dead = least(worth, n, tensor([0,0,0,0,1,1,1,1]))
        assert dead.sum()==n and dead[:4].sum()==n//2
    df = sensitivity(learn, levels=(.5,.9), cache=False)
    assert row(df, 'a', .5).gone==4 and row(df, 'a', .9).gone==6      # never all of a block

@pytest.mark.parametrize('by', ['group','layer'])
def test_nothing_is_disturbed(learn, by):
    def everything():
        return (torch.get_rng_state().tolist(),np.random.get_state()[1].tolist(),random.getstate(),learn.dls.train.rng.getstate(),
                [m.training for m in learn.model.modules()],list(map(str, learn.recorder.values)),[type(c) for c in learn.cbs],learn.opt.hypers)
    learn.model.layer1.eval()
    before,weights,model = everything(),state(learn.model),learn.model
    sensitivity(learn, by, levels=(.5,), update_bn=2, n=30, criterion='taylor', cache=False, show=False)
    assert everything()==before and same(state(learn.model), weights) and learn.model is model

@pytest.mark.parametrize('error', [KeyboardInterrupt(),RuntimeError('boom')])
def test_an_error_leaves_the_learner_its_network(learn, error):
    model = learn.model
    class Stop(Callback):
        def before_validate(self): raise error
    learn.add_cb(Stop())
    with pytest.raises(type(error)): sensitivity(learn, levels=(.5,), cache=False)
    assert learn.model is model

def test_the_second_call_costs_nothing(learn, tmp_path, monkeypatch):
    module._known.clear()
    first = sensitivity(learn, levels=(.5,), cache=tmp_path)
    with monkeypatch.context() as m:
        m.setattr(module, '_measured', None)      # cannot be called
        first.loc[0,'valid_loss'] = -1            # what is kept is not what was handed out
        again = sensitivity(learn, levels=(.5,))
        module._known.clear()
        pd.testing.assert_frame_equal(sensitivity(learn, levels=(.5,), cache=tmp_path), again)
        assert again.valid_loss[0]>0
        for other in (dict(levels=(.6,)), dict(levels=(.5,), n=20), dict(levels=(.5,), criterion='random'), dict(levels=(.5,), cache=False)):
            with pytest.raises(TypeError): sensitivity(learn, **other)
        with torch.no_grad(): learn.model.fc.bias[0] += 1
        with pytest.raises(TypeError): sensitivity(learn, levels=(.5,), cache=tmp_path)

def test_few_samples_are_the_same_every_time(learn):
    a,b = (sensitivity(learn, levels=(.5,), n=40, cache=False) for _ in range(2))
    pd.testing.assert_frame_equal(a, b)
    dl = module._Batches(learn.dls.valid, samples=1)
    assert len(dl)==1 and dl.n_inp==1

def test_statistics_are_estimated_anew(learn):
    old,new = (sensitivity(learn, levels=(.5,), update_bn=n, cache=False) for n in (0,3))
    assert (old[old.level==0].valid_loss.values==new[new.level==0].valid_loss.values).all()
    assert (old[old.level>0].valid_loss.values!=new[new.level>0].valid_loss.values).all()

def test_ignored_layers_and_masked_networks(learn):
    assert 'conv1' not in set(sensitivity(learn, levels=(.5,), ignore='conv1', cache=False).group)
    prune_model(learn, .5)
    there = masks(learn.model)
    df = sensitivity(learn, by='layer', levels=(.4,), cache=False)
    assert masks(learn.model).keys()==there.keys()
    for k,o in df.groupby('layer'):      # what was masked goes first
        if (there[f'{k}.weight']==0).float().mean()>.4: assert o.valid_loss.nunique()==1

def test_pictures(learn):
    df = sensitivity(learn, levels=(.5,))
    ax = plot_sensitivity(df, marks={'conv1': .25})
    assert len([o for o in ax.lines if len(o.get_xdata())==2])==df.group.nunique()
    with pytest.raises(ValueError, match='expected one of valid_loss, accuracy'): plot_sensitivity(df, 'error')

def test_what_is_refused(learn):
    for kwargs,said in ((dict(by='filter'), "by is 'filter', expected 'group' or 'layer'"), (dict(levels=(10,)), 'for 10 % write 0.1'),
                        (dict(levels=(.5,.2)), 'expected rising fractions'), (dict(levels=()), 'expected rising fractions'),
                        (dict(criterion='magntude'), "Did you mean 'magnitude'"), (dict(by='layer', criterion='bn_scale'), 'scores channels')):
        with pytest.raises(ValueError, match=said): sensitivity(learn, **kwargs)
    for dls in (DataLoaders(), DataLoaders(learn.dls.train)):
        with pytest.raises(ValueError, match='the learner holds no .* data'): sensitivity(Learner(dls, learn.model, loss_func=learn.loss_func))
    with pytest.raises(ValueError, match='has no channels that can be removed'): sensitivity(seeded(data(), nn.Sequential(nn.Flatten(), nn.Linear(64,10))))
    with pytest.raises(ValueError, match='has no channels that can be removed'): sensitivity(seeded(per_item(), Two()))
