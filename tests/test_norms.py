"Widths that norms hold: opened, half of them goes, and the outputs are those of the masked network."
import pickle
import pytest
from kdnb.all import *
from kdnb.channels.layers import attributes_of
from kdnb.layers import kind_of, norms
from test_kinds import halved,learns

class Turned(nn.LayerNorm):
    "Over the channels of maps, as in ConvNeXt"
    def forward(self, x): return super().forward(x.permute(0,2,3,1)).permute(0,3,1,2)

class ByHand(nn.Module):
    "A norm of a user's own"
    def __init__(self, n): super().__init__(); self.weight,self.bias,self.eps = nn.Parameter(torch.ones(n)),nn.Parameter(torch.zeros(n)),1e-3
    def forward(self, x):
        d = x-x.mean(1, keepdim=True)
        return d/(d.square().mean(1, keepdim=True)+self.eps).sqrt()*self.weight[:,None,None]+self.bias[:,None,None]

class OwnRoot(nn.Module):
    "An RMSNorm of a user's own, as in Llama"
    def __init__(self, n): super().__init__(); self.weight,self.variance_epsilon = nn.Parameter(torch.ones(n)),1e-3
    def forward(self, x): return self.weight*x*(x.square().mean(-1, keepdim=True)+self.variance_epsilon).rsqrt()

class Maps(nn.Module):
    "A residual block whose width a norm holds"
    def __init__(self, norm):
        super().__init__()
        self.a,self.n,self.b,self.c,self.d = nn.Conv2d(3,16,1),norm(16),nn.Conv2d(16,12,1),nn.Conv2d(12,16,1),nn.Conv2d(16,5,1)
        self.m = norm(16)
    def forward(self, x):
        x = self.a(x)
        return self.d(self.m(x+self.c(self.b(self.n(x)).relu()))).mean((2,3))

class Tokens(nn.Module):
    "Positions, a class token and a layer scale on the width that a norm holds"
    def __init__(self, norm=nn.LayerNorm, positions=nn.Parameter, biases=True):
        super().__init__()
        self.stem,self.norm,self.gamma = nn.Linear(3,12),norm(12),nn.Parameter(torch.rand(12)+.5)
        self.cls,pos = nn.Parameter(torch.randn(1,1,12)),torch.randn(1,7,12)
        if positions is None: self.register_buffer('pos', pos[0,0])
        else: self.pos = positions(pos)
        self.up,self.down,self.last,self.head = nn.Linear(12,16),nn.Linear(16,12),norm(12),nn.Linear(12,5)
    def forward(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.stem(x)], 1)+self.pos
        return self.head(self.last(x+self.gamma*self.down(self.up(self.norm(x)).relu()))[:,0])

def randomised(m):
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn_like(p))
    return m.double().eval()

@pytest.mark.long
@pytest.mark.parametrize('norm', [Turned, ByHand, partial(nn.GroupNorm, 1), partial(Turned, bias=False)])
def test_maps(norm, tmp_path):
    set_seed(0)
    m,x = randomised(Maps(norm)),torch.randn(2,3,6,6).double()
    assert channel_groups(m, x)['a'].stays
    opened = open_norms(m)
    assert max_difference(opened, m, x)<1e-13 and opened.state_dict().keys()==m.state_dict().keys()
    small,_ = halved(opened, x.shape)
    assert (small.a.out_channels, small.b.in_channels, small.c.out_channels, small.d.in_channels, len(small.n.weight))==(8,)*5
    assert small.b.out_channels==6 and not attributes_of(small)
    again = load_model(save_model(small, tmp_path/'small.safetensors', arch=dict(name='own', kwargs={})), lambda: open_norms(Maps(norm).double()))
    assert torch.equal(again(x), small(x))
    twice,_ = halved(pickle.loads(pickle.dumps(small)).eval(), x.shape)       # it is known again, and divides by the first width
    assert twice.a.out_channels==4

@pytest.mark.parametrize('norm,attributes', [(nn.LayerNorm, {}), (partial(nn.RMSNorm, eps=1e-2), dict(eps=2e-2)), (OwnRoot, dict(eps=2e-3))])
def test_tokens(norm, attributes, tmp_path):
    set_seed(0)
    m,x = randomised(Tokens(norm)),torch.randn(2,6,3).double()
    m.pos.requires_grad_(False)
    opened = open_norms(m)
    assert max_difference(opened, m, x)<1e-13
    g = channel_groups(opened, x)['stem']
    assert g.n==12 and {p.path for p in g.tensors}=={'cls','pos','gamma'}
    small,_ = halved(opened, x.shape)
    assert (small.stem.out_features, small.pos.shape, small.cls.shape, small.gamma.shape)==(6,(1,7,6),(1,1,6),(6,))
    assert attributes_of(small)==({n: attributes for n in ('norm','last')} if attributes else {}) and not small.pos.requires_grad
    again = load_model(save_model(small, tmp_path/'small.safetensors', arch=dict(name='own', kwargs={})), lambda: open_norms(Tokens(norm).double()))
    assert torch.equal(again(x), small(x))
    a,b = deepcopy(m).train(),opened.train()       # open, it learns the same
    for o in (a,b): o(x).square().sum().backward()
    for (n,p),q in zip(a.named_parameters(), b.parameters()): assert p.grad is None or torch.allclose(p.grad, q.grad, 1e-9, 1e-9), n

def test_a_channel_goes_only_if_all_that_add_to_it_are_zero():
    set_seed(0)
    m,x = open_norms(randomised(Tokens())),torch.randn(2,6,3).double()
    with torch.no_grad():
        m.up.weight[:,3],m.head.weight[:,3] = 0,0              # nobody reads it, but the mean of all
        assert shrink(m, x).stem.out_features==12
        for p in (m.stem.weight, m.stem.bias, m.down.weight, m.down.bias): p[3] = 0
        assert shrink(m, x).stem.out_features==12               # positions and the class token are left
        m.cls[...,3],m.pos[...,3] = 0,0
    small = shrink(m, x)
    assert small.stem.out_features==11 and max_difference(small, m, x)<1e-14
    assert max_difference(remove_channels(m, x, {'stem': [3]}), m, x)<1e-14

def test_what_stays():
    set_seed(0)
    x = torch.randn(2,6,3)
    fixed = open_norms(Tokens(positions=None).eval())           # a buffer: nothing sets it to zero
    assert channel_groups(fixed, x)['stem'].stays and not channel_groups(fixed, x)['up'].stays
    bare = open_norms(Tokens(partial(nn.LayerNorm, elementwise_affine=False)).eval())
    assert type(bare.norm) is nn.LayerNorm and 'normalises over them' in channel_groups(bare, x)['stem'].stays
    assert 'takes eps from its dtype' in channel_groups(Tokens(nn.RMSNorm).eval(), x)['stem'].stays
    for m in (nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.LayerNorm((2,8)), nn.RMSNorm(8, 1e-6)): assert type(open_norms(m)) is type(m)
    twin = nn.Sequential(nn.Linear(3,8), n := nn.LayerNorm(8), nn.Linear(8,8), n)
    opened = open_norms(twin)
    assert opened[1] is opened[3] and isinstance(opened[1], norms) and kind_of(opened[1]).axis(opened[1])==-1

def test_masks_of_a_pruned_width():
    set_seed(0)
    m,x = open_norms(Tokens().eval()),torch.randn(2,6,3)
    groups = channel_groups(m, x)
    keep = {g.name: torch.arange(g.n)>=g.n//2 for g in groups if not g.stays}
    mask_model(m, channel_masks(m, keep, [g for g in groups if not g.stays]))
    assert not m.pos[...,:6].any() and not m.cls[...,:6].any()
    small = shrink(m, x)
    assert (small.stem.out_features, small.up.out_features)==(6,8) and max_difference(small, m, x)<1e-12

def of_timm(**kwargs):
    timm = pytest.importorskip('timm')
    return timm.models.vision_transformer.VisionTransformer(32, 16, embed_dim=24, depth=2, num_heads=4, num_classes=5, **kwargs)

def convnext(**kwargs):
    timm = pytest.importorskip('timm')
    return timm.models.convnext.ConvNeXt(num_classes=5, depths=(1,1,1,1), dims=(8,8,16,16), **kwargs)

def of_torchvision():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5)

def opened_of_torchvision():
    from torchvision.models import VisionTransformer
    return open_attention(VisionTransformer(32, 16, 2, 4, 24, 48, num_classes=5))

@pytest.mark.parametrize('make,width', [(of_timm, 12), (partial(of_timm, init_values=.1, class_token=False, global_pool='avg'), 12),
                                        (convnext, 4), (partial(convnext, conv_mlp=True, use_grn=True), 4), (of_torchvision, 4),
                                        (opened_of_torchvision, 12)])
def test_networks(make, width, tmp_path):
    set_seed(0)
    m = open_norms(make()).double().eval()
    small,x = halved(m, (2,3,32,32))
    assert [g.stays for g in channel_groups(m, x) if g.stays]==["they are the network's output"]
    first = next(o for o in small.modules() if isinstance(o, nn.Conv2d))
    assert first.out_channels==width
    again = load_model(save_model(small, tmp_path/'small.safetensors', arch=dict(name='own', kwargs={})), lambda: open_norms(make()).double())
    assert torch.equal(again(x), small(x))
    assert learns(small, x, .05, 6)

@pytest.mark.long
def test_onnx(tmp_path):
    pytest.importorskip('onnxruntime')
    set_seed(0)
    small,x = halved(open_norms(of_torchvision()).eval(), (2,3,32,32))
    assert to_onnx(small, x, tmp_path/'small.onnx').difference<=1e-5

def test_a_learner_goes_on_without_half_of_the_width():
    set_seed(0)
    items = [(torch.randn(6,3), torch.tensor(i%5)) for i in range(16)]
    dls = DataLoaders.from_dsets(items, items, bs=8, device='cpu')
    learn = Learner(dls, open_norms(Tokens()), loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        groups = [g for g in channel_groups(learn.model, dls) if not g.stays]
        mask_model(learn.model, channel_masks(learn.model, {g.name: torch.arange(g.n)>=g.n//2 for g in groups}, groups))
        learn.shrink()
        state = {p: learn.opt.state[p] for p in learn.model.parameters()}
        assert learn.model.pos.shape==(1,7,6) and all(s['grad_avg'].shape==p.shape for p,s in state.items() if 'grad_avg' in s)
        learn.fit(1)
    assert all(p.isfinite().all() for p in learn.model.parameters())
