"Labels follow the numbers through any code, and what cannot be followed stays."
import pytest
from kdnb.all import *
from kdnb.channels.trial import _silence
from kdnb.channels.labels import labels_of,OUTPUT,put_labels,varies

class Net(nn.Module):
    "A convolution of 16 channels, `between`, a convolution that reads `n`"
    def __init__(self, between, n=16):
        super().__init__()
        self.a,self.b = nn.Conv2d(3,16,3,padding=1),nn.Conv2d(n,5,1)
        self.between = between if isinstance(between, nn.Module) else None
        self.f = between
    def forward(self, x): return self.b(self.f(self.a(x))).mean((2,3))

X = torch.randn(2,3,8,8)

def group(between, n=16):
    "What becomes of the 16 channels: blocks or None, where they are read, why they stay; removing half is exact if they go"
    set_seed(0)
    m = Net(between, n)
    gs = channel_groups(m, X)
    g = next(g for g in gs if g.name=='a')
    if g.stays: return g
    s = deepcopy(m)
    dead = torch.arange(g.n)%2==0 if g.blocks is None else torch.stack([g.blocks==b for b in g.blocks.unique()]).cumsum(1)[g.blocks, torch.arange(g.n)]%2==1
    _silence(s, g, dead)
    small = shrink(s, X)
    assert small.a.out_channels<16 and max_difference(small, s, X)<1e-12
    return g

@pytest.mark.parametrize('f', [
    lambda x: x.relu().clamp(max=6)*2+1, lambda x: F.hardswish(x), lambda x: x.flip(1), lambda x: x[:,:,::2], lambda x: x*x.mean((2,3), keepdim=True).sigmoid(),
    lambda x: F.interpolate(x, scale_factor=2), lambda x: F.max_pool2d(x, 2),
    lambda x: F.pad(x, (1,2,0,1)), lambda x: x.permute(0,2,3,1).contiguous().permute(0,3,1,2), lambda x: x*torch.ones(1,1,8,8), lambda x: x/(1+x.std((2,3), keepdim=True)),
    lambda x: x.flatten(2).softmax(-1).view_as(x), lambda x: torch.where(x>0, x, x*.1), lambda x: F.normalize(x, dim=(2,3)), lambda x: x.transpose(2,3)+x,
    lambda x: torch.einsum('bchw,bchw->bchw', x, x.exp()), lambda x: x.unsqueeze(2).squeeze(2), lambda x: F.layer_norm(x, (8,)), lambda x: x.roll(2, dims=3),
    lambda x: F.dropout(x, .5, True), lambda x: x+torch.randn_like(x), lambda x: x.clone().mul_(2).add_(x)])
def test_what_leaves_channels_where_they_are(f):
    g = group(f)
    assert g.stays is None and g.n==16 and g.readers[0].path=='b' and g.blocks is None

def test_where_channels_are_read():
    assert group(lambda x: x.flip(1)).readers[0].unit.tolist()==[*range(15,-1,-1)]
    g = group(lambda x: torch.cat([x, x.relu()], 1), 32)
    assert g.readers[0].unit.tolist()==[*range(16)]*2
    g = group(lambda x: x.repeat(1,2,1,1), 32)
    assert g.n==16 and len(g.readers[0].at)==32
    g = group(lambda x: F.glu(x, 1), 8)
    assert g.n==8 and g.makers[0].unit.tolist()==[*range(8)]*2          # both halves go together
    g = group(nn.PixelShuffle(2), 4)
    assert g.n==4 and g.makers[0].unit.tolist()==[i//4 for i in range(16)]
    g = group(nn.PixelUnshuffle(2), 64)
    assert g.n==16 and g.readers[0].unit.tolist()==[i//4 for i in range(64)]

def test_as_many_of_each_row():
    g = group(lambda x: x.unflatten(1, (4,-1)).sub(1).flatten(1, 2))
    assert g.stays is None and g.blocks.tolist()==[i//4 for i in range(16)]

@pytest.mark.parametrize('f', [nn.ChannelShuffle(4), lambda x: x.view(len(x), 4, -1, 8, 8).transpose(1, 2).flatten(1, 2)])
def test_a_shuffle_takes_the_same_place_of_each_row(f):
    g = group(f)
    assert g.stays is None and g.n==4 and g.blocks is None and g.makers[0].unit.tolist()==[*range(4)]*4

def test_chunks_of_equal_size():
    def f(x): a,b = x.chunk(2, 1); return torch.cat([b, a], 1)
    assert group(f).blocks.tolist()==[0]*8+[1]*8
    def g(x): a,b = x.chunk(2, 1); return a+b.relu()
    assert group(g, 8).n==8                                              # what is added goes together

@pytest.mark.parametrize('f,n,why', [
    (lambda x: x.softmax(1), 16, 'softmax mixes them'), (lambda x: x*x.mean(1, keepdim=True), 16, 'mean mixes them'), (lambda x: x.cumsum(1), 16, 'cumsum mixes them'),
    (lambda x: x.sort(1).values, 16, 'sort mixes them'), (lambda x: x[:,:1].expand(-1,16,-1,-1), 16, 'cuts them into 16 parts'),
    (lambda x: x[:,3:4]*x, 16, 'cuts them into 16 parts'), (lambda x: x+torch.randn(1,16,1,1), 16, 'join them'), (lambda x: F.group_norm(x, 4), 16, 'group_norm reads them'),
    (lambda x: F.layer_norm(x, (16,8,8)), 16, 'normalises over them'), (lambda x: torch.fft.fft(x, dim=1).real, 16, 'reads them'),
    (lambda x: F.local_response_norm(x, 3), 16, 'cannot be followed'), (lambda x: x.gather(1, torch.arange(16).flip(0).view(1,-1,1,1).expand_as(x)), 16, 'by number'),
    (lambda x: (x.flatten(2)@x.flatten(2).transpose(1, 2)).unsqueeze(-1), 16, 'product|join|cannot'), (lambda x: x.view(len(x),4,4,8,8)[:,:,0].repeat(1,4,1,1), 16, ''),
    (lambda x: F.pad(x, (0,0,0,0,1,1)), 18, 'counts|cannot|join')])
def test_what_is_mixed_or_picked_stays(f, n, why):
    import re
    g = group(f, n)
    assert g.stays is None or re.search(why, g.stays), g.stays

class Scale(nn.Module):
    "A layer scale, or a BatchNorm that is frozen: tensors for each channel, outside of layers"
    def __init__(self, buffer=False):
        super().__init__()
        t = torch.rand(16)+.5
        if buffer: self.register_buffer('gamma', t)
        else: self.gamma = nn.Parameter(t)
    def forward(self, x): return x*self.gamma.view(1,-1,1,1)

@pytest.mark.parametrize('buffer', [False,True])
def test_tensors_outside_of_layers_are_cut(buffer):
    g = group(Scale(buffer))
    assert g.stays is None and [p.path for p in g.tensors]==['between.gamma']
    m = Net(Scale(buffer))
    _silence(m, g, torch.arange(16)<4)
    s = shrink(m, X)
    assert s.between.gamma.shape==(12,) and torch.equal(s.between.gamma, m.between.gamma[4:]) and isinstance(s.between.gamma, nn.Parameter)!=buffer

def test_frozen_batchnorm():
    from torchvision.ops import FrozenBatchNorm2d
    g = group(FrozenBatchNorm2d(16))
    assert g.stays is None and len(g.tensors)==4

def test_a_table_of_positions_goes_along_or_is_named():
    class Pos(nn.Module):
        def __init__(self, learnt): super().__init__(); self.pos = nn.Parameter(torch.randn(1,16,8,8)) if learnt else None; self.register_buffer('fixed', torch.randn(1,16,8,8))
        def forward(self, x): return x+(self.fixed if self.pos is None else self.pos)
    g = group(Pos(True))
    assert g.stays is None and [p.path for p in g.tensors]==['between.pos']
    assert 'join them' in group(Pos(False)).stays

def test_a_layer_that_runs_twice():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(6,8),nn.Linear(8,8),nn.Linear(8,3)
        def forward(self, x): return self.c(self.b(self.b(self.a(x).relu()).relu()))
    g, = (g for g in channel_groups(Twice(), torch.randn(4,6)) if not g.stays)
    assert g.n==8 and [p.path for p in g.makers]==['a','b'] and [p.path for p in g.readers]==['b','c']

def test_labels_stand_still_along_expanded_axes():
    x = torch.randn(2,3,4,4)
    put_labels(x, torch.arange(1, 4, dtype=torch.int32), 1)
    assert [varies(labels_of(x), d) for d in range(4)]==[False,True,False,False]

def test_results_do_not_hang_on_the_default_device():
    "A tensor that is made without a device would land on `meta`, and fail"
    m = create('resnet8', in_shape=(1,8,8))
    with torch.no_grad(): m.layer1[0].conv1.weight[:5] = 0; m.layer1[0].bn1.weight[:5] = 0; m.layer1[0].bn1.bias[:5] = 0
    x = torch.randn(2,1,8,8)
    want = shrink(m, x)
    torch.set_default_device('meta')
    try: got,groups = shrink(m, x),channel_groups(m, x)
    finally: torch.set_default_device(None)
    assert [p.shape for p in got.parameters()]==[p.shape for p in want.parameters()] and all(p.device.type=='cpu' for p in got.parameters())
    assert got.layer1[0].conv1.out_channels==11 and all(p.at.device.type=='cpu' for g in groups for p in g.parts)
