"Layers and code of each kind lose half of their channels: the sizes are right, the outputs are the same, and a saved one comes back."
import pytest
from kdnb.all import *
from kdnb.channels.layers import attributes_of, set_attributes
from kdnb.layers import LayerKind, _kinds, kind_of, layer_kind
from zoo import half

class Split(nn.Module):
    "Parts of lengths that a list holds, as in MixNet"
    def __init__(self):
        super().__init__()
        self.splits = [6,10]
        self.a,self.b,self.c,self.d = nn.Conv2d(3,16,1),nn.Conv2d(6,4,1),nn.Conv2d(10,4,3,padding=1),nn.Conv2d(8,3,1)
    def forward(self, x):
        p,q = self.a(x).relu().split(self.splits, 1)
        return self.d(torch.cat([self.b(p), self.c(q)], 1)).mean((2,3))

class Scales(nn.Module):
    "Equal parts of a length that a number holds, each added to what was made of the one before, as in Res2Net"
    def __init__(self):
        super().__init__()
        self.width = 4
        self.a,self.d = nn.Conv2d(3,16,1),nn.Conv2d(16,3,1)
        self.cs = nn.ModuleList([nn.Conv2d(4,4,3,padding=1) for _ in range(3)])
    def forward(self, x):
        first,*parts = torch.split(self.a(x).relu(), self.width, 1)
        outs,y = [first],0
        for i,(c,p) in enumerate(zip(self.cs, parts)):
            y = c(y+p if i else p).relu()
            outs.append(y)
        return self.d(torch.cat(outs, 1)).mean((2,3))

class Partial(nn.Module):
    "The first channels only, as in RexNet and FasterNet"
    def __init__(self):
        super().__init__()
        self.inside = 6
        self.a,self.b,self.d = nn.Conv2d(3,16,1),nn.Conv2d(6,6,3,padding=1),nn.Conv2d(16,3,1)
    def forward(self, x):
        x = self.a(x).relu()
        return self.d(torch.cat([self.b(x[:,:self.inside]), x[:,self.inside:]], 1)).mean((2,3))

class Selective(nn.Module):
    "A softmax over two paths, channel by channel, as in SKNet; the input is halved by a division"
    def __init__(self):
        super().__init__()
        self.width,self.n_paths = 16,2
        self.a,self.d = nn.Conv2d(3,16,1),nn.Conv2d(12,3,1)
        self.paths,self.pick = nn.ModuleList([nn.Conv2d(8,12,3,padding=1) for _ in range(2)]),nn.Conv2d(12,24,1)
    def forward(self, x):
        parts = self.a(x).relu().split(self.width//self.n_paths, 1)
        y = torch.stack([p(o) for p,o in zip(self.paths, parts)], 1)
        w = self.pick(y.sum(1).mean((2,3), keepdim=True))
        w = w.view(len(w), self.n_paths, w.shape[1]//self.n_paths, 1, 1).softmax(1)
        return self.d((y*w).sum(1)).mean((2,3))

class Attention(nn.Module):
    "Four heads of fused queries, keys and values"
    def __init__(self, fused=True, named=True):
        super().__init__()
        self.num_heads,self.head_dim,self.inner,self.fused,self.named = 4,8,32,fused,named
        self.norm,self.q_norm = nn.LayerNorm(12),nn.LayerNorm(8)
        self.stem,self.qkv,self.proj,self.head = nn.Linear(3,12),nn.Linear(12,96),nn.Linear(32,12),nn.Linear(12,5)
    def forward(self, x):
        x = self.stem(x)
        q,k,v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2,0,3,1,4).unbind(0)
        q = self.q_norm(q)
        if self.fused: y = F.scaled_dot_product_attention(q, k, v)
        else: y = (q@k.transpose(-2, -1)*self.head_dim**-.5).softmax(-1)@v
        y = y.transpose(1, 2).reshape(*x.shape[:2], self.inner if self.named else 32)
        return self.head((x+self.proj(y)).mean(1))

class Grouped(nn.Module):
    "GroupNorm over four channels each, and over two"
    def __init__(self):
        super().__init__()
        self.a,self.n,self.b,self.m,self.c = nn.Conv2d(3,16,1),nn.GroupNorm(4, 16),nn.Conv2d(16,16,3,groups=16),nn.GroupNorm(8, 16),nn.Conv2d(16,5,1)
    def forward(self, x): return self.c(self.m(self.b(self.n(self.a(x)).relu()))).mean((2,3))

class Spread(nn.Module):
    "A convolution that makes three channels of each, as in FastViT"
    def __init__(self):
        super().__init__()
        self.a,self.s,self.n,self.c = nn.Conv2d(3,8,1),nn.Conv2d(8,24,3,groups=8),nn.BatchNorm2d(24),nn.Conv2d(24,5,1)
    def forward(self, x): return self.c(self.n(self.s(self.a(x).relu())).relu()).mean((2,3))

class MeanNorm(nn.Module):
    "A user's own layer: each channel is divided by the mean of all"
    def __init__(self, n):
        super().__init__()
        self.scale = 1.
        self.weight,self.bias = nn.Parameter(torch.rand(n)+.5),nn.Parameter(torch.randn(n))
    def forward(self, x): return self.scale*self.weight*x/(1+x.abs().mean(-1, keepdim=True)*self.scale) + self.bias

class Own(nn.Module):
    def __init__(self): super().__init__(); self.a,self.n,self.b = nn.Linear(3,8),MeanNorm(8),nn.Linear(8,5)
    def forward(self, x): return self.b(self.n(self.a(x).relu()))

IMAGES,TOKENS = (2,3,8,8),(2,6,3)

def halved(m, shape):
    "`m` with half of each group at zero, and shrunken"
    x = torch.randn(shape)
    masked = deepcopy(m)
    with torch.no_grad():
        for g in channel_groups(m, x):
            if g.stays: continue
            for key,there in g.traces(m, half(g)): masked.get_parameter(key).masked_fill_(there, 0)
    small = shrink(masked, x)
    assert max_difference(small, masked, x)<1e-12
    return small,x

@pytest.mark.parametrize('make,shape,widths,attributes', [
    (Split, IMAGES, dict(a=9, b=2, c=2), {'': {'splits': [1,8]}}),      # of 16 the first 8, but one of each part stays
    (Scales, IMAGES, {'a': 8, 'cs.0': 2, 'cs.2': 2, 'd': 3}, {'': {'width': 2}}),
    (Partial, IMAGES, dict(a=9, b=3), {'': {'inside': 1}}),
    (Selective, IMAGES, {'a': 8, 'paths.0': 6, 'paths.1': 6, 'pick': 12}, {'': {'width': 8}}),
    (Attention, TOKENS, dict(qkv=48, stem=12, proj=12), {'': {'num_heads': 2, 'inner': 16}}),
    (partial(Attention, False), TOKENS, dict(qkv=48, stem=12, proj=12), {'': {'num_heads': 2, 'inner': 16}}),
    (partial(Attention, named=False), TOKENS, dict(qkv=96, stem=12, proj=12), {}),        # the code says 32
    (Grouped, IMAGES, dict(a=8, b=8), {'n': {'num_groups': 2, 'num_channels': 8}, 'm': {'num_groups': 4, 'num_channels': 8}}),
    (Spread, IMAGES, dict(a=4, s=12), {})])
def test_half_of_each_group(make, shape, widths, attributes, tmp_path):
    set_seed(0)
    m = make().eval()
    small,x = halved(m, shape)
    made = {p: len(o.weight) for p,o in small.named_modules() if isinstance(o, (nn.Linear,nn.Conv2d))}
    assert {p: made[p] for p in widths}==widths
    assert attributes_of(small)==attributes
    again = load_model(save_model(small, tmp_path/'small.safetensors', arch=dict(name='own', kwargs={})), lambda: make())
    assert attributes_of(again)==attributes and torch.equal(again(x), small(x))
    twice,_ = halved(small.eval(), shape)       # and once more
    assert n_params(twice)<=n_params(small)<=n_params(m)

def test_why_a_width_stays():
    set_seed(0)
    gs = channel_groups(Attention(), torch.randn(TOKENS))
    assert gs['stem'].stays=='LayerNorm norm normalises over them' and gs['qkv'].n==4
    assert 'LayerNorm q_norm' in channel_groups(Attention(named=False), torch.randn(TOKENS))['qkv'].stays

def test_a_user_adds_a_kind():
    set_seed(0)
    m,x = Own().eval(),torch.randn(4,3)
    assert 'mean mixes them' in channel_groups(m, x)['a'].stays
    @layer_kind(MeanNorm)
    class Kind(LayerKind):
        sums = True
        def axis(self, m): return -1
        def rescale(self, m, before):      # the mean of the rest is larger by as much as there are fewer
            share = len(m.weight)/before
            m.scale *= share
            m.weight.data.div_(share)
        def noted(self, m): return ('scale',)
    try:
        assert kind_of(m.n).sizes(m.n)==(8,8)
        small,_ = halved(m, (4,3))
        assert small.a.out_features==4 and small.n.scale==.5 and attributes_of(small)=={'n': {'scale': .5}}
        with torch.no_grad(): m.b.weight[:,:3] = 0       # nobody reads them, but the mean does
        assert shrink(m, x).a.out_features==8
    finally: del _kinds[MeanNorm]

def test_attributes_that_do_not_fit_are_refused():
    for given in ({'': {'num_heads': 5}}, {'': {'num_heads': 2.}}, {'': {'none': 1}}, {'x': {'num_heads': 1}}, [1], {'': 3}, {'': {'forward': 1}}):
        with pytest.raises(ValueError, match='cannot become|expected'): set_attributes(Attention(), given)
