"Layers and code of each kind lose half of their channels: the sizes are right, the outputs are the same, and a saved one comes back."
from contextlib import contextmanager
import pytest
from pytest import approx
from kdnb.all import *
from kdnb.channels.layers import attributes_of, set_attributes
from kdnb.kinds import StandardisedKind
from kdnb.layers import LayerKind, LinearKind, MakesKind, _kinds, kind_of, layer_kind
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

class Recurrent(nn.Module):
    "A layer of units that read themselves, between two linear layers"
    def __init__(self, kind=nn.LSTM, states=False, **kwargs):
        super().__init__()
        self.a,self.rnn,self.states = nn.Linear(3,16),kind(16, 12, batch_first=True, **kwargs),states
        self.b = nn.Linear(24 if self.rnn.bidirectional else 12, 5)
    def forward(self, x):
        y,h = self.rnn(self.a(x))
        if self.states: return self.b(torch.cat([h[-2], h[-1]], 1))
        return self.b(y[:,-1])

class Steps(nn.Module):
    "A cell, step by step"
    def __init__(self):
        super().__init__()
        self.a,self.cell,self.b = nn.Linear(3,16),nn.GRUCell(16, 12),nn.Linear(12,5)
    def forward(self, x):
        h = None
        for o in self.a(x).unbind(1): h = self.cell(o, h)
        return self.b(h)

class Words(nn.Module):
    "An embedding whose width nothing holds"
    def __init__(self):
        super().__init__()
        self.e,self.f,self.b = nn.Embedding(20,16),nn.Linear(16,12),nn.Linear(12,5)
    def forward(self, x): return self.b(self.f(self.e(x.abs().long().clamp(max=19)[...,0])).relu().mean(1))

class Llama(nn.Module):
    "RMSNorm, two queries for each key, a gated MLP"
    def __init__(self):
        super().__init__()
        self.stem,self.norm,self.head = nn.Linear(3,16),nn.RMSNorm(16),nn.Linear(16,5)
        self.gate,self.up,self.down = nn.Linear(16,24),nn.Linear(16,24),nn.Linear(24,16)
        self.q,self.k,self.v,self.o = nn.Linear(16,32),nn.Linear(16,16),nn.Linear(16,16),nn.Linear(32,16)
    def forward(self, x):
        x = self.stem(x)
        q,k,v = (f(self.norm(x)).unflatten(2, (-1,8)).transpose(1, 2) for f in (self.q,self.k,self.v))
        k,v = k.repeat_interleave(2, 1),v.repeat_interleave(2, 1)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.down(F.silu(self.gate(self.norm(x)))*self.up(self.norm(x)))).mean(1))

class Biased(Attention):
    "A table of relative positions with a column for each head, as in Swin"
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(11,4))
        self.register_buffer('places', (torch.arange(6)[:,None]-torch.arange(6)+5).flatten())
    def forward(self, x):
        x = self.stem(x)
        q,k,v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2,0,3,1,4).unbind(0)
        bias = self.table[self.places].view(6, 6, -1).permute(2,0,1).unsqueeze(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(*x.shape[:2], self.inner)
        return self.head((x+self.proj(y)).mean(1))

class Compared(nn.Module):
    "Attention whose heads cannot go: one, or queries of several that share their keys, or as many as the code says"
    def __init__(self, fused=True, q=8, k=8, v=6, heads=1):
        super().__init__()
        self.heads,self.fused,self.scale = str(heads),fused,8**-.5      # a text: no number that could follow
        self.stem,self.norm,self.head = nn.Linear(3,12),nn.LayerNorm(12),nn.Linear(12,5)
        self.q,self.k,self.v,self.proj = nn.Linear(12,q),nn.Linear(12,k),nn.Linear(12,v),nn.Linear(int(self.heads)*v,12)
    def forward(self, x):
        x = self.stem(x)
        h = self.norm(x)
        q,k,v = self.q(h).unflatten(2, (int(self.heads),-1)).transpose(1, 2),self.k(h)[:,None],self.v(h)[:,None]
        if self.fused: y = F.scaled_dot_product_attention(q, k, v)
        else: y = (q*self.scale@k.mT).softmax(-1)@v
        return self.head((x+self.proj(y.transpose(1, 2).flatten(2))).mean(1))

class FixedHeads(nn.Module):
    "Three heads of fused queries, keys and values, and the code says three"
    def __init__(self):
        super().__init__()
        self.stem,self.norm = nn.Linear(3,12),nn.LayerNorm(12)
        self.qkv,self.proj,self.head = nn.Linear(12,72),nn.Linear(24,12),nn.Linear(12,5)
    def forward(self, x):
        x = self.stem(x)
        q,k,v = self.qkv(self.norm(x)).unflatten(2, (3,3,-1)).permute(2,0,3,1,4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x+self.proj(y)).mean(1))

class Standardised(nn.Conv2d):
    "A filter is standardised over all that it reads; a gain for what it makes"
    def __init__(self, *args): super().__init__(*args); self.gain = nn.Parameter(torch.rand(self.out_channels,1,1,1)+.5)
    def forward(self, x):
        w = self.weight-self.weight.mean((1,2,3), keepdim=True)
        return self._conv_forward(x, self.gain*w/(w.square().mean((1,2,3), keepdim=True)+1e-6).sqrt(), self.bias)

class NoNorm(nn.Module):
    "As NFNet: standardised convolutions, no norm"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = Standardised(3, 12, 3),Standardised(12, 12, 3),nn.Conv2d(12,5,1)
    def forward(self, x): return self.c(self.b(self.a(x).relu()).relu()).mean((2,3))

class Centred(nn.Linear):
    "A subclass with a parameter for what it reads; as many come in as go out"
    def __init__(self, *args): super().__init__(*args); self.centre = nn.Parameter(torch.rand(self.in_features))
    def forward(self, x): return super().forward(x*self.centre)

class LowRank(nn.Module):
    "A user's own layer with a weight"
    def __init__(self, n, m):
        super().__init__()
        self.weight,self.bias,self.gain = nn.Parameter(torch.randn(m,n)),nn.Parameter(torch.randn(m)),nn.Parameter(torch.rand(m))
    def forward(self, x): return torch.einsum('mn,bn->bm', self.weight, x)*self.gain + self.bias

class OwnWeights(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(3,8),Centred(8,8),LowRank(8,6); self.d = nn.Linear(6,5)
    def forward(self, x): return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())

IMAGES,TOKENS = (2,3,8,8),(2,6,3)

def halved(m, shape):
    "`m` with half of each group at zero, and shrunken"
    x = torch.randn(shape).to(next(m.parameters()))
    masked = deepcopy(m)
    with torch.no_grad():
        for g in channel_groups(m, x):
            if g.stays: continue
            for key,there in g.traces(m, half(g)): masked.get_parameter(key).masked_fill_(there, 0)
    small = shrink(masked, x)
    assert max_difference(small, masked, x)<1e-12
    return small,x

def learns(m, x, lr, n):
    "Is the loss of `m` on two inputs smaller after `n` steps?"
    opt,losses = torch.optim.SGD(m.train().parameters(), lr),[]
    for _ in range(n):
        losses.append(F.cross_entropy(m(x), torch.tensor([1,2])))
        losses[-1].backward()
        opt.step()
        opt.zero_grad()
    return losses[-1]<losses[0]

@pytest.mark.parametrize('make,shape,widths,attributes', [
    (Split, IMAGES, dict(a=9, b=2, c=2), {'': {'splits': [1,8]}}),      # of 16 the first 8, but one of each part stays
    (Scales, IMAGES, {'a': 8, 'cs.0': 2, 'cs.2': 2, 'd': 3}, {'': {'width': 2}}),
    (Partial, IMAGES, dict(a=9, b=3), {'': {'inside': 1}}),
    (Selective, IMAGES, {'a': 8, 'paths.0': 6, 'paths.1': 6, 'pick': 12}, {'': {'width': 8}}),
    (Attention, TOKENS, dict(qkv=48, stem=12, proj=12), {'': {'num_heads': 2, 'inner': 16}}),
    (partial(Attention, False), TOKENS, dict(qkv=48, stem=12, proj=12), {'': {'num_heads': 2, 'inner': 16}}),
    (partial(Attention, named=False), TOKENS, dict(qkv=96, stem=12, proj=12), {}),        # the code says 32
    (Grouped, IMAGES, dict(a=8, b=8), {'n': {'num_groups': 2, 'num_channels': 8}, 'm': {'num_groups': 4, 'num_channels': 8}}),
    (Spread, IMAGES, dict(a=4, s=12), {}),
    (Recurrent, TOKENS, dict(a=8, b=5), {'rnn': {'hidden_size': 6, 'input_size': 8}}),
    (partial(Recurrent, nn.GRU), TOKENS, dict(a=8, b=5), {'rnn': {'hidden_size': 6, 'input_size': 8}}),
    (partial(Recurrent, num_layers=2), TOKENS, dict(a=8, b=5), {'rnn': {'hidden_size': 6, 'input_size': 8}}),
    (partial(Recurrent, nn.GRU, True, num_layers=2, bidirectional=True), TOKENS, dict(a=8, b=5), {'rnn': {'hidden_size': 6, 'input_size': 8}}),
    (partial(Recurrent, nn.RNN, bidirectional=True), TOKENS, dict(a=8, b=5), {'rnn': {'hidden_size': 6, 'input_size': 8}}),
    (Steps, TOKENS, dict(a=8), {'cell': {'hidden_size': 6, 'input_size': 8}}),
    (Words, TOKENS, dict(f=6, b=5), {'e': {'embedding_dim': 8}}),
    (Llama, TOKENS, dict(stem=16, q=16, k=8, v=8, gate=12, up=12), {}),      # one of two keys, with its two queries
    (Biased, TOKENS, dict(qkv=48, stem=12, proj=12), {'': {'num_heads': 2, 'inner': 16}}),
    # the root of what is left divides, so queries are multiplied by it, and what keeps it as a number follows
    (lambda: Compared().double(), TOKENS, dict(q=4, k=4, v=3, stem=12), {'': {'scale': approx(.5)}}),
    (partial(Compared, False), TOKENS, dict(q=4, k=4, v=3, stem=12), {}),
    (lambda: Compared(q=24, heads=3).double(), TOKENS, dict(q=12, k=4, v=3, stem=12), {'': {'scale': approx(.5)}}),
    (lambda: FixedHeads().double(), TOKENS, dict(qkv=36, stem=12), {})])
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

@contextmanager
def kinds():
    "A user's kinds, for the time of a test"
    before = dict(_kinds)
    try: yield
    finally: _kinds.clear(); _kinds.update(before)

def test_a_standardised_weight_becomes_a_plain_one(tmp_path):
    set_seed(0)
    m = NoNorm().double().eval()       # a weight that is written down is rounded
    stays = channel_groups(m, torch.randn(IMAGES).double())['a'].stays
    assert 'gain for what it makes' in stays or 'computes its weight' in stays
    with kinds():
        layer_kind(Standardised)(StandardisedKind)
        small,x = halved(m, IMAGES)
        assert type(small.a) is Standardised and type(small.b) is nn.Conv2d and small.b.weight.shape==(6,6,3,3)
        assert attributes_of(small)=={'b': {'folded': 1}} and 'gain' not in small.b._parameters
        again = load_model(save_model(small, tmp_path/'small.safetensors', arch=dict(name='own', kwargs={})), lambda: NoNorm().double())
        assert type(again.b) is nn.Conv2d and torch.equal(again(x), small(x))

def test_users_kinds_with_a_weight(tmp_path):
    set_seed(0)
    m,x = OwnWeights().eval(),torch.randn(4,3)
    stays = {g.name: g.stays for g in channel_groups(m, x)}
    assert 'may have its centre for what it makes or for what it reads' in stays['a'] and stays['b'] and 'c' not in stays
    with kinds():
        @layer_kind(Centred)
        class CentredKind(LinearKind):
            def sides(self, m, name): return {0: 1} if name=='centre' else super().sides(m, name)
        @layer_kind(LowRank)
        class LowRankKind(MakesKind):
            def sides(self, m, name): return {0: 0} if name=='gain' else super().sides(m, name)
        small,_ = halved(m, (4,3))
        assert (small.a.out_features, small.b.centre.shape, small.c.weight.shape, small.c.gain.shape)==(4, (4,), (3,4), (3,))
        again = load_model(save_model(small, tmp_path/'small.safetensors', arch=dict(name='own', kwargs={})), OwnWeights)
        assert torch.equal(again(x), small(x))

def test_units_that_are_zero_go():
    set_seed(0)
    m,x = Recurrent().eval(),torch.randn(TOKENS)
    with torch.no_grad():
        for p in m.rnn.parameters(): p.view(4, 12, -1)[:,3] = 0      # makes nothing, in all four gates
    assert shrink(m, x).rnn.hidden_size==11
    m.rnn.bias_ih_l0.data[3] = 1.                                        # the input gate alone opens on nothing
    assert shrink(m, x).rnn.hidden_size==12 or max_difference(shrink(m, x), m, x)<1e-12
    with torch.no_grad(): m.b.weight[:,5],m.rnn.weight_hh_l0[:,5] = 0,0  # nobody reads it
    assert shrink(m, x).rnn.hidden_size<=11

def test_units_of_deep_layers_that_are_zero_go():
    set_seed(0)
    m,x = Recurrent(nn.GRU, num_layers=2, bidirectional=True).eval(),torch.randn(TOKENS)
    def silence(unit, name):
        with torch.no_grad():
            for p in (getattr(m.rnn, f'{n}_{name}') for n in ('weight_ih','weight_hh','bias_ih','bias_hh')): p.view(3, 12, -1)[:,unit] = 0
    for i,name in enumerate(('l0','l0_reverse','l1')): silence(i, name)
    small = shrink(m, x)
    assert small.rnn.hidden_size==12 and {g.name: (g.n, bool(g.stays)) for g in channel_groups(Stays(), x)}['rnn']==(24,True)
    silence(7, 'l1_reverse')                       # now each has one, at places of their own
    small = shrink(m, x)
    assert small.rnn.hidden_size==11 and max_difference(small, m, x)<1e-6
    loss = F.cross_entropy(small.train()(x), torch.tensor([1,2]))
    loss.backward()
    assert all(p.grad is not None for p in small.parameters())

class Stays(Recurrent):
    "Units of one direction are normalised, so that those of the other stay, too"
    def __init__(self):
        super().__init__(nn.GRU, bidirectional=True)
        self.n = nn.LayerNorm(12)
    def forward(self, x):
        y = self.rnn(self.a(x))[0].unflatten(2, (2,12))
        return self.b(torch.cat([self.n(y[:,:,0]), y[:,:,1]], 2)[:,-1])

class Projected(Recurrent):
    "An LSTM that puts out sums of its units; its cells are looked at, too, or its states are given"
    def __init__(self, cells=False, given=False, **kwargs):
        super().__init__(**kwargs)
        self.cells,self.given = cells,given
        runs,ways = self.rnn.num_layers,1+self.rnn.bidirectional
        self.rnn = nn.LSTM(16, 12, proj_size=8, num_layers=runs, bidirectional=ways>1, batch_first=True)
        self.b = nn.Linear(ways*8, 5)
        if cells: self.c = nn.Linear(12, 5)
        if given: self.h0,self.c0 = nn.Linear(16, 8),nn.Linear(16, 12)
    def forward(self, x):
        x = self.a(x)
        h0 = (self.h0(x[:,0])[None],self.c0(x[:,1])[None]) if self.given else None
        y,(h,c) = self.rnn(x, hx=h0) if self.given=='hx' else self.rnn(x, h0)
        return self.b(y[:,-1])+(self.c(c[-1]) if self.cells else 0)

@pytest.mark.parametrize('kwargs,rows', [
    (dict(), {}), (dict(cells=True), {}), (dict(given=True), dict(h0=4, c0=6)), (dict(given='hx'), dict(h0=4, c0=6)),
    (dict(num_layers=2), {}), (dict(num_layers=2, bidirectional=True), {})])
def test_units_and_their_projection_go(kwargs, rows, tmp_path):
    set_seed(0)
    def make(): return Projected(**kwargs).double().eval()
    m = make()
    groups = [g for g in channel_groups(m, torch.randn(TOKENS).double()) if g.makers[0].path=='rnn']
    runs = len(m.rnn.all_weights)
    assert sorted(g.n for g in groups if not g.stays)==[8*runs,12*runs] or rows
    small,x = halved(m, TOKENS)
    sizes = dict(a=8, b=5) | rows
    assert {p: len(small.get_submodule(p).weight) for p in sizes}==sizes
    assert attributes_of(small)=={'rnn': dict(hidden_size=6, input_size=8, proj_size=4)}
    again = load_model(save_model(small, tmp_path/'small.safetensors', arch=dict(name='own', kwargs={})), make)
    assert torch.equal(again(x), small(x)) and macs(small, x)['']<macs(m, x)['']/2
    small.train()(x).square().sum().backward()
    assert all(p.grad.shape==p.shape for p in small.parameters())

def test_units_behind_a_projection_that_are_zero_go():
    set_seed(0)
    m,x = Projected().double().eval(),torch.randn(TOKENS).double()
    with torch.no_grad(): m.rnn.weight_hr_l0[:,[2,5]] = 0               # nobody sums these units
    small = shrink(m, x)
    assert (small.rnn.hidden_size, small.rnn.proj_size)==(10,8) and max_difference(small, m, x)<1e-14
    with torch.no_grad(): m.rnn.weight_hr_l0[3] = 0                     # a sum of nothing
    small = shrink(m, x)
    assert (small.rnn.hidden_size, small.rnn.proj_size, small.b.in_features)==(10,7,7) and max_difference(small, m, x)<1e-14
    with torch.no_grad():
        for p in (getattr(m.rnn, f'{n}_l0') for n in ('weight_ih','weight_hh','bias_ih','bias_hh')): p.view(4, 12, -1)[:,7] = 0
    assert shrink(m, x).rnn.hidden_size==9                              # a unit of zeros
    seen = Projected(cells=True).double().eval()
    seen.rnn.weight_hr_l0.data[:,2] = 0
    assert shrink(seen, x).rnn.hidden_size==12                          # its cell is looked at
    alone = remove_channels(m, x, {'rnn': [0,1,12]})                    # units first, what comes out last
    assert (alone.rnn.hidden_size, alone.rnn.proj_size)==(10,7)

def test_packed_sequences_stay():
    class Packed(Recurrent):
        def forward(self, x):
            o = nn.utils.rnn.pack_padded_sequence(self.a(x), torch.tensor([6]*len(x)), batch_first=True)
            return self.b(self.rnn(o)[1][0][-1])
    m = Packed().eval()
    gs = channel_groups(m, torch.randn(TOKENS))
    assert gs['a'].stays
    if not gs['rnn'].stays: halved(m, TOKENS)

def test_half_of_a_vision_transformer_trains_on():
    timm = pytest.importorskip('timm')
    set_seed(0)
    m = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=4, num_classes=5).eval()
    small,x = halved(m, (2,3,32,32))
    assert [(b.attn.num_heads, b.attn.proj.in_features, b.mlp.fc1.out_features) for b in small.blocks]==[(2,12,48)]*2
    assert learns(small, x, .1, 10)

@pytest.mark.parametrize('batch_first', [True,False])
def test_open_attention(batch_first):
    set_seed(0)
    m,x = nn.MultiheadAttention(16, 4, batch_first=batch_first, kdim=6, vdim=10).double().eval(),torch.randn(2,5,32).double()
    qkv = x[...,:16],x[...,16:22],x[...,22:]
    out,none = open_attention(m)(*qkv, need_weights=False)
    assert none is None and (out-m(*qkv)[0]).abs().max()<1e-14 and 'MultiheadAttention' in type(m).__name__
    for kwargs in (dict(add_bias_kv=True), dict(add_zero_attn=True), dict(dropout=.1)):
        with pytest.raises(ValueError, match='Build it without'): open_attention(nn.MultiheadAttention(8, 2, **kwargs))

@pytest.mark.parametrize('side', 'qk')
def test_one_side_of_zeros_is_enough(side):
    set_seed(0)
    m,x = Compared().double().eval(),torch.randn(TOKENS).double()
    layer,g = getattr(m, side),next(g for g in channel_groups(m, x) if g.name=='q')
    assert g.paired.all() and not g.readers and [p.path for p in g.makers]==['q','k']
    with torch.no_grad(): layer.weight[2:4],layer.bias[2:4] = 0,0
    small = shrink(m, x)
    assert small.q.out_features==small.k.out_features==6 and small.v.out_features==6 and max_difference(small, m, x)<1e-12
    layer.bias.data[2] = 1.                                              # a constant is compared, too
    assert shrink(m, x).q.out_features==7
    with torch.no_grad(): m.proj.weight[:] = 0                           # nobody listens: then they are dead
    small = shrink(m, x)
    assert small.q.out_features in (1,7) and max_difference(small, m, x)<1e-12

def test_a_proof_sees_through_attention():
    set_seed(0)
    m,x = Compared(v=8).double(),torch.randn(TOKENS).double()
    for n in 'qv':
        other = deepcopy(m)
        getattr(other, n).weight.data *= 2
        assert max_difference(other, m, x)>1e-3

def test_numbers_of_one_length_are_told_apart():
    timm = pytest.importorskip('timm')
    set_seed(0)
    m = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=4, num_classes=5).eval()
    small,_ = halved(m, (2,3,32,32))       # four heads of four numbers
    a = small.blocks[0].attn
    assert (a.num_heads, a.head_dim, a.proj.in_features)==(2,4,8)

def test_shared_keys_of_timm_go_in_pairs():
    layer = pytest.importorskip('timm.layers.attention2d').MultiQueryAttention2d
    set_seed(0)
    m = nn.Sequential(nn.Conv2d(3,16,1), layer(16, num_heads=2, key_dim=8, value_dim=8, kv_stride=2), nn.Conv2d(16,5,1), nn.Flatten(), nn.Linear(80,5)).double().eval()
    small,x = halved(m, (2,3,4,4))
    a = small[1]
    assert (a.query.proj.out_channels, a.key.proj.out_channels, a.value.proj.out_channels, a.key_dim, a.scale)==(8,4,4,4,approx(.5))
    m[1].fused_attn = a.fused_attn = False
    twice,_ = halved(small.eval(), (2,3,4,4))
    assert (twice[1].key.proj.out_channels, twice[1].scale)==(2,approx(.5))      # it stays what it is where it is read

@pytest.mark.parametrize('version', ['','V2'])
def test_open_windows(version, tmp_path):
    from torchvision.models import swin_transformer as swin
    set_seed(0)
    block,merge = getattr(swin, f'SwinTransformerBlock{version}'),getattr(swin, f'PatchMerging{version}')
    def make(): return swin.SwinTransformer([4,4], 8, [2], [2], [4,2], num_classes=5, block=block, downsample_layer=merge).double().eval()
    m,x = make(),torch.randn(2,3,20,24).double()
    with torch.no_grad():
        for n,p in m.named_parameters():
            if 'bias' in n or 'scale' in n: p.normal_()
    opened = open_attention(m)
    assert max_difference(opened, m, x)<1e-12
    a,b = deepcopy(m).train(),deepcopy(opened).train()
    for o in (a,b):
        set_seed(0)
        o.loss = o(x).square().sum()
        o.loss.backward()
    att,new = a.features[1][1].attn,b.features[1][1].attn
    test_close(a.loss.item(), b.loss.item(), 1e-9)
    test_close(att.qkv.weight.grad[:8], new.q.weight.grad, 1e-9)
    small,_ = halved(opened, x.shape)
    assert [(o.attn.q.out_features, o.attn.v.out_features, o.mlp[0].out_features) for o in small.features[1]]==[(4,4,16)]*2
    again = load_model(save_model(small, tmp_path/'small.safetensors', arch=dict(name='own', kwargs={})), lambda: open_attention(make()))
    assert torch.equal(again(x), small(x))
    other = torch.randn(1,3,16,8).double()      # another size, a single window wide
    assert torch.isfinite(small(other)).all() and (opened(other)-m(other)).abs().max()<1e-12

def test_attributes_that_do_not_fit_are_refused():
    for given in ({'': {'num_heads': 5}}, {'': {'num_heads': 2.}}, {'': {'none': 1}}, {'x': {'num_heads': 1}}, [1], {'': 3}, {'': {'forward': 1}}):
        with pytest.raises(ValueError, match='cannot become|expected'): set_attributes(Attention(), given)
