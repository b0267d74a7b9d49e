"Fractions and caps for layers, widths in multiples, channels round by round, classes and blocks that go: exact numbers, exact networks."
import math

import pytest
from common import X, data, quiet, seeded
from kdnb.all import *
from kdnb.channels.trial import channel_groups

XB = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
def res8(): set_seed(0); return create('resnet8')
def widths(model): return {g.name: g.n for g in channel_groups(shrink(model, XB), XB)}
def dense_widths(): return {g.name: g.n for g in channel_groups(res8(), XB)}
def gone(model, of): return sum(int((m==0).sum()) for k,m in masks(model).items() if k.startswith(of))
def mlp(): set_seed(0); return nn.Sequential(OrderedDict(a=nn.Linear(64, 30), act=nn.ReLU(), b=nn.Linear(30, 20), act2=nn.ReLU(), c=nn.Linear(20, 10)))


# a fraction or a cap for a layer

@pytest.mark.parametrize('scope', ['global','layer'])
def test_each_name_has_its_own_fraction(scope):
    m = prune_model(res8(), {'layer3': .7, 'layer1.0.conv1': .29, 'fc': 0}, scope=scope)
    of = {k: [w.numel() for n,w in prunable(res8()).items() if n.startswith(k)] for k in ('layer3','layer1.0.conv1')}
    for k,f in {'layer3': .7, 'layer1.0.conv1': .29}.items():
        want = math.ceil(f*sum(of[k])-1e-9) if scope=='global' else sum(math.ceil(f*n-1e-9) for n in of[k])
        assert gone(m, k)==want
    assert not gone(m, 'conv1') + gone(m, 'layer1.0.conv2') + gone(m, 'layer2') + gone(m, 'fc')

def test_the_units_of_a_name_compete_with_each_other_alone():
    m = mlp()
    m.a.weight.data.mul_(.01)
    together = prune_model(mlp_with(m), {'a': .1, 'b': .5})
    alone = prune_model(prune_model(mlp_with(m), .1, ignore=['b','c']), .5, ignore=['a','c'])
    assert all(torch.equal(masks(together)[k], masks(alone)[k]) for k in ('a.weight','b.weight'))

def mlp_with(m): new = mlp(); new.load_state_dict(m.state_dict()); return new

def test_the_nearest_name_decides_and_the_empty_one_is_the_rest():
    m = prune_model(mlp(), {'': .5, 'b': .25, 'c.weight': 0.})
    assert [gone(m, k) for k in 'abc']==[960,150,0]
    m = prune_model(mlp(), {'*': .5, 'b': .25})
    assert gone(m, 'b')==150 and gone(m, 'a')+gone(m, 'c')==(1920+200)//2

def test_channels_take_the_fraction_of_their_makers():
    w = widths(prune_model(res8(), {'': .25, 'layer3': .75, 'layer2.0.conv1': .5}, data=XB, by='channel'))
    dense = dense_widths()
    part = {k: .75 if k.startswith('layer3') else .5 if k=='layer2.0.conv1' else .25 for k in dense if k!='fc'}
    assert {k: n for k,n in w.items() if k!='fc'}=={k: dense[k]-math.ceil(f*dense[k]) for k,f in part.items()}

def test_a_cap_holds_back():
    m = mlp()
    m.a.weight.data.mul_(1e-7)
    assert gone(prune_model(mlp_with(m), .5), 'a')==(1920+600+200)//2
    held = prune_model(mlp_with(m), .5, cap={'a': .3})
    assert gone(held, 'a')==576 and gone(held, '')==(1920+600+200)//2
    assert [gone(prune_model(mlp_with(m), .9, cap=.255), k) for k in 'abc']==[489,153,51]      # no more than .255 of each: 51.0 of 200
    assert gone(prune_model(held, .5, cap={'a': .1}), 'a')==576      # what is gone stays gone

def test_every_round_of_a_cap_is_exact():
    m,left = mlp(),[]
    for _ in range(4): left.append(gone(prune_model(m, {'a': .5}, rate=.3), ''))
    assert left==[576,960,960,960]

WRONG = [({'layer4': .5}, "has no layer 'layer4'. The nearest names are 'layer3'"), ({'bn1': .5}, "names 'bn1', which holds nothing that is pruned. There are conv1"),
         ({'layer3': 70}, r"sparsity\['layer3'\] is 70, expected a fraction between 0 and 1: for 70 % write 0.7"), ({}, 'sparsity is empty'),
         ({'layer1.*': .5, '*.0.conv1': .2}, 'in each of them')]
@pytest.mark.parametrize('given, says', WRONG)
def test_wrong_names_and_fractions_are_refused_and_nothing_is_masked(given, says):
    for call in (lambda m: prune_model(m, given), lambda m: quiet(seeded(data(), m), 1, cbs=Pruner(given))):
        m = create('resnet8', in_shape=tuple(X.shape[1:]))
        with pytest.raises(ValueError, match=says): call(m)
        assert not masks(m)

def test_a_cap_is_refused_in_its_own_name():
    with pytest.raises(ValueError, match="cap names 'act'"): prune_model(mlp(), .5, cap={'act': .5})
    with pytest.raises(ValueError, match='cap is 2, expected'): Pruner(cap=2)
    with pytest.raises(ValueError, match='a pattern takes the same of every layer'): prune_model(mlp(), pattern='2:4', cap=.5)

def digits_mlp():
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), a=nn.Linear(64, 30), act=nn.ReLU(), b=nn.Linear(30, 20), act2=nn.ReLU(), c=nn.Linear(20, 10)))

@pytest.mark.parametrize('schedule', ['gradual','iterative','one_shot'])
def test_pruner_reaches_every_fraction(schedule):
    learn = quiet(seeded(data(), digits_mlp()), 2, 1e-3, cbs=Pruner({'a': .9, 'b': .57}, schedule=schedule))
    assert [gone(learn.model, k) for k in 'abc']==[1728,342,0]

def test_pruner_warns_of_what_is_missing_of_fractions():
    class Stop(Callback):
        def after_epoch(self): raise CancelFitException()
    with pytest.warns(UserWarning, match=r"asked for: {'a': 0.9}. prune_model\(learn, {'a': 0.9}, cap=0.95\) prunes the rest"):
        quiet(seeded(data(), digits_mlp()), 8, 1e-3, cbs=[Pruner({'a': .9}, schedule='gradual', cap=.95), Stop()])


# widths in multiples

@pytest.fixture(scope='module')
def vgg():
    "A small VGG, a batch, and the worth of its channels by group"
    set_seed(0)
    m,xb = create('vgg8', width=.3),torch.randn(2, 3, 32, 32)
    return m,xb,scores(m, data=xb, by='channel')

@pytest.mark.parametrize('asked', [.1, .3, .5, .7, .95])
@pytest.mark.parametrize('scope', ['layer','global'])
def test_widths_are_multiples_and_never_narrower_than_asked(asked, scope, vgg):
    m,xb,worth = vgg
    m,dense = deepcopy(m),{k: len(v) for k,v in worth.items()}
    plain = {k: int(v.sum()) for k,v in select(worth, asked, scope=scope, keep_one=True).items()}
    prune_model(m, asked, data=xb, by='channel', scope=scope, round_to=8)
    small = {g.name: g.n for g in channel_groups(shrink(m, xb), xb) if not g.stays}
    assert small=={k: min(n, -(-plain[k]//8)*8) for k,n in dense.items()}

def test_the_best_come_back_and_the_pruned_do_not():
    m = nn.Sequential(OrderedDict(a=nn.Linear(4, 12), act=nn.ReLU(), b=nn.Linear(12, 2)))
    m.a.weight.data = torch.arange(1., 13)[:,None].expand(12, 4).clone()
    x = torch.randn(2, 4)
    prune_model(m, .5, data=x, by='channel', round_to=8)
    assert m.a.weight.abs().sum(1).nonzero().flatten().tolist()==[*range(4, 12)]
    prune_model(m, .25, data=x, by='channel', round_to=5)      # of the 8 that are left 8 stay: ten would be two too many
    assert m.a.weight.abs().sum(1).count_nonzero()==8

def test_a_grouped_convolution_keeps_multiples_in_each_block():
    set_seed(0)
    m = nn.Sequential(OrderedDict(a=nn.Conv2d(3, 24, 3), b=nn.Conv2d(24, 24, 3, groups=3), c=nn.Conv2d(24, 4, 1)))
    prune_model(m, .7, data=XB, by='channel', round_to=4)
    small = shrink(m, XB)
    assert small.a.out_channels==small.b.out_channels==12 and small.b.groups==3      # lcm(4, 3), not 8

@pytest.mark.parametrize('round_to, by, says', [(0,'channel','round_to is 0'), (8,'weight',"by='channel'"), (2.,'channel','round_to is 2.0')])
def test_what_is_no_multiple_is_refused(round_to, by, says):
    with pytest.raises(ValueError, match=says): Pruner(by=by, round_to=round_to)


# channels, round by round

def rounds(sparsity=.5, n_epoch=1, **kwargs):
    set_seed(0)
    learn = seeded(data(), nn.Sequential(OrderedDict(c1=nn.Conv2d(1, 11, 3), act=nn.ReLU(), c2=nn.Conv2d(11, 20, 3, stride=2), act2=nn.ReLU(), flat=nn.Flatten(), fc=nn.Linear(80, 10))))
    with learn.no_bar(),learn.no_logging(): return learn,iterative_prune(learn, sparsity, n_epoch=n_epoch, lr=1e-3, by='channel', **kwargs)

@pytest.mark.parametrize('rewind', ['lr','weights','finetune'])
def test_channels_go_round_by_round(rewind):
    learn,levels = rounds(.6, rate=.4, rewind=rewind)
    n = [g.n for g in channel_groups(learn.model, learn.dls) if not g.stays]
    left = n
    for o in levels:
        assert o.channels==pytest.approx(1-sum(left)/sum(n))
        left = [max(k-math.ceil(.4*k-1e-9), a-math.ceil(.6*a-1e-9)) for k,a in zip(left, n)]
    assert len(levels)==3 and 'channels' in levels.curve
    masked = deepcopy(learn.model)
    learn.shrink()
    assert [g.n for g in channel_groups(learn.model, learn.dls) if not g.stays]==[k-math.ceil(.6*k) for k in n]
    assert max_difference(learn.model, masked, learn.dls)<1e-5

def test_rounds_end_where_widths_allow_no_more():
    learn,levels = rounds(.8, rate=.2, round_to=4, n_epoch=1)
    dense = [g.n for g in channel_groups(levels[0].model, learn.dls) if not g.stays]
    learn.shrink()
    assert [g.n for g in channel_groups(learn.model, learn.dls) if not g.stays]==[-(-(n-math.ceil(.8*n))//4)*4 for n in dense]
    assert all(a.channels<b.channels for a,b in zip(levels, levels[1:]))

def test_rounds_of_fractions():
    learn,levels = rounds({'c2': .5}, rate=.5)
    dense = {g.name: g.n for g in channel_groups(levels[0].model, learn.dls) if not g.stays}
    learn.shrink()
    assert {g.name: g.n for g in channel_groups(learn.model, learn.dls) if not g.stays}==dict(c1=11, c2=10) and dense==dict(c1=11, c2=20)


# classes

@pytest.mark.parametrize('model', [lambda: create('lenet5', in_shape=(3,32,32)), lambda: create('resnet8'),
    lambda: nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),      # as in SqueezeNet
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 10), nn.ReLU(), nn.Linear(10, 10)),      # ten neurons before ten classes
    lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(3*32*32, 10)))])
def test_logits_that_stay_are_the_same(model):
    set_seed(0)
    m,x = model().double().eval(),torch.randn(4, 3, 32, 32).double()
    small = keep_classes(m, [7,0,3], x)
    assert torch.allclose(small.eval()(x), m(x)[:,[7,0,3]], rtol=1e-12, atol=1e-12) and small(x).shape==(4,3)

def test_learner_data_and_labels_follow():
    dls = image_dls('digits', device='cpu')
    learn = seeded(dls, create('lenet5', dls))
    keep_classes(learn, [8,1])
    assert list(learn.dls.vocab)==[8,1] and [len(o.dataset) for o in learn.dls.loaders]==[int(((d.dataset.y==8)|(d.dataset.y==1)).sum()) for d in dls.loaders]
    for a,b in zip(learn.dls.loaders, dls.loaders):
        y = b.dataset.y[(b.dataset.y==8)|(b.dataset.y==1)]
        assert torch.equal(a.dataset.y, (y==1).long())
    quiet(learn, 1)
    assert learn.predict(dls.valid.dataset.x[0])[0] in ('8','1')

@pytest.mark.parametrize('tail', [nn.Softmax(1), nn.LogSoftmax(1), nn.LayerNorm(10)])
def test_what_looks_at_all_classes_is_refused(tail):
    with pytest.raises(ValueError, match='can lose classes without changing the others'):
        keep_classes(nn.Sequential(nn.Flatten(), nn.Linear(48, 10), tail), [0,1], torch.randn(2, 3, 4, 4))


# blocks

class Scaled(nn.Module):
    "As a block of ConvNeXt: norm, MLP, layer scale"
    def __init__(self, n):
        super().__init__()
        self.norm,self.fc1,self.fc2,self.gamma = nn.LayerNorm(n),nn.Linear(n, 2*n),nn.Linear(2*n, n),nn.Parameter(torch.full((n,), .1))
    def forward(self, x): return x + self.gamma*self.fc2(F.gelu(self.fc1(self.norm(x))))

def nets():
    set_seed(0)
    return [(create('resnet20'), torch.randn(2, 3, 16, 16)), (nn.Sequential(*[Scaled(6) for _ in range(3)]), torch.randn(2, 5, 6)),
            (nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 16, 0., norm_first=True, batch_first=True) for _ in range(3)]), torch.randn(2, 5, 8))]

@pytest.mark.parametrize('i, n', [(0,7), (1,3), (2,3)])
def test_a_block_that_is_masked_is_a_block_that_is_gone(i, n):
    m,x = nets()[i]
    table = block_changes(m, x)
    assert len(table)==n and table.change.is_monotonic_increasing
    small = remove_blocks(m, 2, x)
    gone = [p for p in table.index if isinstance(small.get_submodule(p), nn.Identity)]
    masked,small = deepcopy(m).double().eval(),small.double().eval()
    mask_model(masked, {f'{p}.{k}': torch.zeros_like(w) for p in gone for k,w in m.get_submodule(p).named_parameters()})
    with torch.no_grad(): assert len(gone)==2 and torch.allclose(small(x.double()), masked(x.double()), rtol=1e-12, atol=1e-12)

def test_the_block_that_changes_least_goes_first():
    m,x = nets()[1]
    m[1].gamma.data.mul_(1e-3)
    assert block_changes(m, x).index[0]=='1' and isinstance(remove_blocks(m, 1, x)[1], nn.Identity)
    h = m[0](x)
    assert block_changes(m, x).change['1']==pytest.approx(((m[1](h)-h).norm()/h.norm()).item(), rel=1e-4)

def test_blocks_that_cannot_go():
    post = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)      # its norm comes last: never the identity
    with pytest.raises(ValueError, match='has no block that is the identity'): block_changes(nn.Sequential(post, nn.Linear(8, 8)), torch.randn(2, 5, 8))
    m,x = nets()[0]
    with pytest.raises(ValueError, match="'layer2.0' is not the identity"): remove_blocks(m, ['layer2.0'], x)
    with pytest.raises(ValueError, match="no layer 'layer9'"): remove_blocks(m, ['layer9'], x)
    with pytest.raises(ValueError, match='Pass `data`'): remove_blocks(m)
