"The papers' networks have the papers' sizes, run on every image size, and come back from a file."
import json, pickle
from copy import deepcopy

import pytest
import torch.nn.functional as F
from torchvision import models as tv

from common import rest_long
from kdnb.all import *

CIFAR,TINY,IMAGENET = dict(c=100), dict(c=200, in_shape=(3,64,64)), dict(c=1000, in_shape=(3,224,224))

def meta(name, **kwargs):
    with torch.device('meta'): return create(name, **kwargs)
def shape_of(net): return tuple(net.arch['kwargs']['in_shape'])
def all_macs(net): return macs(net, (torch.zeros(1, *shape_of(net)),))['']
def convs(net): return [m for m in net.modules() if isinstance(m, nn.Conv2d)]

@pytest.mark.parametrize('name,kw,printed', [
    *((f'resnet{d}', {}, n) for d,n in {8:'78K', 20:'272K', 32:'466K', 56:'855K', 110:'1.7M'}.items()),              # PrUE, Table 2
    *((f'resnet{d}', CIFAR, n) for d,n in {8:'83.9K', 20:'278K', 32:'472K', 56:'861K', 110:'1.7M'}.items()),
    ('shufflenet_v2_x1_0', TINY, '1.5M'), ('efficientnet_b2', IMAGENET, '9.1M'), ('mobilenet_v3_small', IMAGENET, '2.5M'),
    ('vgg19', CIFAR, '20.1M'), ('vgg19_cl1', CIFAR, '11.0M'), ('vgg19_cl2', CIFAR, '9.9M'), ('vgg19dbl', CIFAR, '75.4M'),
    ('resnet18', TINY, '11.3M'), ('mobilenet_v2', TINY, '2.5M'),                                  # Prune Your Model, Table 9
    ('wrn_16_1', {}, '0.2M'), ('wrn_16_2', {}, '0.7M'), ('wrn_40_1', {}, '0.6M'), ('wrn_40_2', {}, '2.2M'),
    ('wrn_28_10', {}, '36.5M'), ('resnet164', {}, '1.7M')])          # Zagoruyko and Komodakis 2016; He et al. 2016b
def test_params_as_printed(name, kw, printed):
    "To one unit of the last digit: some papers round, some cut"
    digits,unit = printed[:-1],dict(K=1e3, M=1e6)[printed[-1]]
    last = unit/10**len(digits.partition('.')[2])
    assert abs(n_params(meta(name, **kw)) - float(digits)*unit) < last

@pytest.mark.parametrize('name,kw,printed,tol', [
    ('vgg19', CIFAR, 399, .007), ('vgg19_cl1', CIFAR, 158, .007), ('vgg19_cl2', CIFAR, 264, .007), ('vgg19dbl', CIFAR, 1495, .007),
    ('resnet18', TINY, 149, .007), ('mobilenet_v2', TINY, 27, .09)])
def test_macs_as_printed(name, kw, printed, tol):
    "ptflops also counts biases, normalisation and ReLU: a little on wide layers, more on MobileNet's"
    assert 1-tol < all_macs(meta(name, **kw))/(printed*1e6) <= 1

def test_vgg19_layer_by_layer():
    "Prune Your Model, Tables 10 and 11 (the printed total of Table 10 is 8 more than its rows)"
    def rows(name, **kw): return [m.weight.numel() for m in meta(name, c=100, **kw).modules() if isinstance(m, weighted)]
    assert rows('vgg19') == [1728,36864,73728,147456,294912] + [589824]*3 + [1179648] + [2359296]*7 + [51200]
    assert sum(rows('vgg19')) == 20_070_080
    assert rows('vgg19_cl1') == [1728] + [36864]*3 + [73728] + [147456]*3 + [294912] + [589824]*3 + [1179648] + [2359296]*3 + [51200]
    assert sum(rows('vgg19_cl1')) == 11_001_536
    assert rows('vgg19_cl2') == [1728,22464,62829,127269,251694,493830,504990,475668,806796,1364922,1111500,711000,385362,339021,
                                 684297,2520576,51200]
    assert sum(rows('vgg19_cl2')) == 9_915_146
    st79 = [1080,17640,48951,96903,196425,378675,376992,342720,544680,746532,461340,196020,98901,83916,224532,326106,12200]
    widths,ni = [],3
    for w in st79[:-1]: widths.append(w//(9*ni)); ni = widths[-1]
    assert rows('vgg19', widths=widths) == st79
    assert abs(all_macs(meta('vgg19', c=100, widths=widths))/174e6 - 1) < .007

def test_printed_but_not_these():
    "VGG-16 on Tiny-ImageNet is printed as 18.1M, ResNeXt-50 as 15.0M: as much with 32 groups in the first convolution too"
    assert n_params(meta('vgg16', **TINY)) == 14_821_512
    net = meta('resnext50_32x4d', **TINY)
    first = sum(m.weight.numel() for k,m in net.named_modules() if k.startswith('layer') and k.endswith('conv1'))
    assert n_params(net) == 23_389_704 and n_params(net) - first*31//32 == 15_001_352

NETWORKS = [o for o in architectures if o!='simkd_student']     # which takes two others
ONE_EACH = 'lenet5 mlp cifar_resnet resnet20 wrn_16_2 vgg8 torchvision_net resnet18 densenet121 efficientnet_b0 shufflenet_v2_x1_0 mobilenet_v3_small resnext50'
@pytest.mark.parametrize('name', rest_long(NETWORKS, ONE_EACH))
def test_every_network(name):
    "Runs on 8 × 8 grey pixels; on larger images too, and its `arch` builds the same network after a trip through JSON"
    net = create(name, c=7, in_shape=(1,8,8))
    y = net(torch.randn(2,1,8,8))
    assert y.shape == (2,7) and y.isfinite().all()
    for shape in [(3,32,32), (2,40,64)]:
        net = meta(name, c=3, in_shape=shape)
        assert net(torch.zeros(2, *shape, device='meta')).shape == (2,3)
    arch = json.loads(json.dumps(net.arch))
    assert arch['name'] == name
    again = meta(arch['name'], **arch['kwargs'])
    assert [(k,v.shape) for k,v in again.state_dict().items()] == [(k,v.shape) for k,v in net.state_dict().items()]

@pytest.mark.parametrize('name,kw', [
    ('lenet5_caffe', {}), ('resnet8', dict(option='A')), ('resnet14', {}), ('wrn_10_2', {}), ('cifar_resnet', dict(kind='bottleneck', depth=11)),
    ('vgg11', dict(widths=[4,6,8,8,10,12,14,16])), ('vgg8', dict(width=.125)), ('mlp', dict(hidden=16)), ('resnet18', dict(width=.125)),
    ('densenet121', {}), ('shufflenet_v2_x1_0', {}), ('mobilenet_v3_small', dict(width=.5)), ('efficientnet_b0', {})])
def test_comes_back_from_a_file(name, kw, tmp_path):
    net,x = create(name, c=5, in_shape=(2,9,10), **kw),torch.randn(4,2,9,10)
    net(x)                                                                         # batch statistics to remember
    back = load_model(save_model(net.eval(), tmp_path/'net.safetensors'))
    assert torch.equal(back(x), net(x)) and back.arch['name'] == name


@pytest.mark.parametrize('ni,n,stride,h', [(4,6,2,5), (16,32,2,8), (3,3,1,4), (2,5,1,1)])
def test_option_A(ni, n, stride, h):
    x = torch.randn(2,ni,h,h)
    y = PadShortcut(ni, n, stride)(x)
    assert torch.equal(y[:,:ni], x[:,:,::stride,::stride]) and y.shape[1] == n and not y[:,ni:].any()
    block = create('resnet8', option='A', in_shape=(3,8,8)).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)                                               # nothing but the shortcut is left
    x = torch.rand(1,16,8,8)
    assert torch.equal(block(x)[:,:16], x[:,:,::2,::2]) and not block(x)[:,16:].any()

def bn(x, s, k): return F.batch_norm(x, s[k+'.running_mean'], s[k+'.running_var'], s[k+'.weight'], s[k+'.bias'], eps=1e-5)
def basic(x, s, b, stride):
    y = F.relu(bn(F.conv2d(x, s[b+'conv1.weight'], stride=stride, padding=1), s, b+'bn1'))
    y = bn(F.conv2d(y, s[b+'conv2.weight'], padding=1), s, b+'bn2')
    if (k := b+'shortcut.0.weight') in s: x = bn(F.conv2d(x, s[k], stride=stride), s, b+'shortcut.1')
    return F.relu(x + y)
def preact(x, s, b, stride):
    a = y = F.relu(bn(x, s, b+'bn1'))
    ws = [s[f'{b}conv{i}.weight'] for i in (1,2,3) if f'{b}conv{i}.weight' in s]
    for i,w in enumerate(ws, 1):
        if i>1: y = F.relu(bn(y, s, f'{b}bn{i}'))
        y = F.conv2d(y, w, stride=stride if i==len(ws)-1 else 1, padding=w.shape[-1]//2)
    return y + (F.conv2d(a, s[k], stride=stride) if (k := b+'shortcut.weight') in s else x)

@pytest.mark.parametrize('kind,depth,width', [('basic',14,1), ('preact',16,2), ('bottleneck',20,1)])
def test_residual_reference(kind, depth, width):
    "Written again from the papers' formulas; in a WRN of two convolutions the first carries the stride"
    set_seed(0)
    net,n = create('cifar_resnet', kind=kind, depth=depth, width=width, in_shape=(3,12,12)).double(),2
    x = torch.randn(4,3,12,12, dtype=torch.double)
    net(x); net.eval()
    s = net.state_dict()
    y = F.conv2d(x, s['conv1.weight'], padding=1)
    if kind=='basic': y = F.relu(bn(y, s, 'bn1'))
    for stage in (1,2,3):
        for j in range(n): y = (basic if kind=='basic' else preact)(y, s, f'layer{stage}.{j}.', 2 if stage>1 and j==0 else 1)
    if kind!='basic': y = F.relu(bn(y, s, 'bn1'))
    y = y.mean((2,3)) @ s['fc.weight'].T + s['fc.bias']
    assert (net(x) - y).abs().max() < 1e-9

@pytest.mark.parametrize('name,kw,layers', [('resnet20', {}, 20), ('resnet110', {}, 110), ('resnet164', {}, 164), ('vgg9', {}, 9),
                                            ('vgg16', {}, 14), ('vgg19', {}, 17), ('mlp1024', {}, 8)])
def test_depth(name, kw, layers):
    "Layers with weights, projections aside; a VGG here has one linear layer instead of three"
    assert sum(isinstance(m, weighted) and 'shortcut' not in k for k,m in meta(name, **kw).named_modules()) == layers

def test_small_vggs_for_grey_images():
    for name,widths,n in (('vgg8_16', [16,32,64,128,128], 5), ('vgg11_16', [16,32,64,64,128,128,128,128], 8)):
        net = meta(name, c=10, in_shape=(1,28,28))
        assert [m.out_channels for m in convs(net)]==widths and len(convs(net))==n and net.fc.in_features==128
        assert net(torch.zeros(2,1,28,28, device='meta')).shape==(2,10)
        with pytest.raises(TypeError, match='width'): create(name, width=.5)

def test_vgg_pools_while_there_are_pixels():
    for side,pools in {1:0, 2:1, 8:3, 28:4, 32:5, 64:5}.items():
        net = meta('vgg19', in_shape=(3,side,side))
        assert sum(isinstance(m, nn.MaxPool2d) for m in net) == pools
    assert [k for k,_ in net.named_children()][:8] == ['conv0','bn0','act0','conv1','bn1','act1','pool0','conv2']
    assert [m.out_channels for m in convs(meta('vgg9'))] == [64,128,256,256,512,512,512,512] == [m.out_channels for m in convs(meta('vgg11'))]

def test_mlp_of_VID():
    net = meta('mlp2048')
    assert [tuple(m.weight.shape) for m in net.modules() if isinstance(m, nn.Linear)] == [
        (2048,3072), *[(512,2048), (2048,512)]*3, (10,2048)]
    assert [type(m).__name__ for m in net.fc2] == ['Linear','Linear']
    assert sum(isinstance(m, nn.Dropout) and m.p==.2 for m in net) == sum(isinstance(m, nn.ReLU) for m in net) == 4


@pytest.mark.parametrize('base', ['resnet18','densenet121','mobilenet_v2','shufflenet_v2_x1_0'])
def test_torchvision_own(base):
    "With ImageNet's stem and three channels it is torchvision's network, weight for weight"
    set_seed(3); ours = create(base, c=4, in_shape=(3,64,64)).state_dict()
    set_seed(3); theirs = getattr(tv, base)(num_classes=4).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k,v in ours.items())

@pytest.mark.long
def test_small_stem():
    for base in ('resnet50','densenet121','shufflenet_v2_x1_0','mobilenet_v2','efficientnet_b0'):
        small,large = (meta(base, in_shape=(1,32,32), stem=o) for o in ('small','imagenet'))
        assert small.arch['kwargs']['stem'] == 'small' and all_macs(small) > 3*all_macs(large)
        first = convs(small)[0]
        assert (first.in_channels, first.kernel_size, first.stride, first.padding) == (1, (3,3), (1,1), (1,1))
        assert not any(isinstance(m, nn.MaxPool2d) for m in small.modules())
        assert all_macs(meta(base, in_shape=(1,32,32))) == all_macs(small)
        assert convs(meta(base, in_shape=(1,32,33)))[0].stride == (2,2)

def test_width():
    net,dbl = meta('resnet18', **TINY),meta('resnet18dbl', **TINY)
    assert n_weights(dbl) == 4*n_weights(net) - 2*net.conv1.weight.numel() - 2*net.fc.weight.numel()
    assert [2*m.out_channels for m in convs(net)] == [m.out_channels for m in convs(dbl)]
    for base in ('mobilenet_v2','mobilenet_v3_small'):
        assert n_params(meta(base, c=9, in_shape=(3,64,64), width=.5)) == n_params(getattr(tv, base)(num_classes=9, width_mult=.5))
    assert [m.out_channels for m in convs(meta('vgg11', width=.5))] == [32,64,128,128,256,256,256,256]
    assert convs(meta('resnet8x4'))[0].out_channels == 32 and meta('resnet8x4').fc.in_features == 256

def test_densenet_needs_pixels():
    for stem,least in [('small',8), ('imagenet',29)]:
        net = meta('densenet121', in_shape=(1,least,least), stem=stem)
        assert net(torch.zeros(2,1,least,least, device='meta')).shape == (2,10)
        with pytest.raises(ValueError, match=f'{least-1} × {least}, densenet121 with this stem needs at least {least} × {least}'):
            create('densenet121', in_shape=(1,least-1,least), stem=stem)
        with pytest.raises(RuntimeError): net(torch.zeros(2,1,least-1,least, device='meta'))

@pytest.mark.parametrize('name,kw,says', [
    ('lenet6', {}, "no network is called 'lenet6'. Near it are lenet5"), ('resnet2O', {}, 'Near it are .*resnet20'), ('vgg19d', {}, 'vgg19dbl'),
    ('?', {}, 'There are lenet300, lenet5,'), (None, {}, 'no network is called None'), ('wrn_1000_1', {}, 'no network is called'),
    ('wrn_20_2', {}, 'depth is 20, it must be 6n \\+ 4'), ('cifar_resnet', dict(depth=18), 'it must be 6n \\+ 2'),
    ('cifar_resnet', dict(depth=2), 'n from 1 to 200'), ('cifar_resnet', dict(depth=6*10**9+2), 'n from 1 to 200'),
    ('cifar_resnet', dict(kind='wide'), 'There are basic, preact, bottleneck'), ('resnet8', dict(option='C'), "option is 'C'. Pass 'A'"),
    ('vgg', dict(depth=12), 'depth is 12. VGGs have 8, 9'), ('vgg11', dict(widths=[8]*7), 'widths are 7, VGG-11 has 8 convolutions'),
    ('resnet18', dict(stem='tiny'), "stem is 'tiny'"), ('torchvision_net', dict(base='vit_b_16'), "base is 'vit_b_16'. There are resnet18"),
    ('densenet121', dict(width=2), 'densenet121 has no width factor'), ('resnet8', dict(width='2'), "width is '2', expected a factor"),
    ('vgg8', dict(width=0), 'width is 0, expected a factor of the channels above 0'), ('resnet18', dict(width=float('nan')), 'width is nan'),
    ('resnet8', dict(stem=.5), 'stem is 0.5, expected a whole number'), ('resnet8', dict(c=0), 'c is 0, expected a whole number'),
    ('resnet8', dict(in_shape=(8,8)), 'in_shape is \\(8, 8\\), expected 3 whole numbers'), ('lenet5', dict(in_shape=8), 'in_shape is 8, expected 3'),
    ('cifar_resnet', dict(depth='8'), "depth is '8', expected a whole number"), ('vgg8', dict(widths=5), 'widths is 5, expected whole numbers'),
    ('vgg8', dict(widths=[1,2,3,4,.5]), 'expected whole numbers'), ('mlp', dict(hidden=(3,4)), 'hidden is \\(3, 4\\), expected a whole number'),
    ('mlp', dict(hidden=3), 'a bottleneck has a quarter of it'), ('lenet300', dict(hidden=(5,.5)), 'hidden is \\(5, 0.5\\), expected whole'),
    ('resnet8', dict(width=.5, option='A'), "Pass stem=8, or option='B'"), ('resnext50', dict(width=.3), '38 channels are not 32 equal groups')])
def test_errors(name, kw, says):
    before = list(architectures)
    with pytest.raises(ValueError, match=says): create(name, **kw)
    assert list(architectures) == before

@pytest.mark.parametrize('name,kw,channels', [('resnet8', dict(width=.5), 32), ('resnet8', dict(width=.01), 1), ('resnet164', dict(width=.5), 128),
                                              ('resnet8', dict(width=.5, option='A', stem=8), 32), ('vgg8', dict(width=.3), 154), ('resnet18', dict(width=.33), 169)])
def test_a_width_may_be_a_fraction(name, kw, channels, tmp_path):
    net = create(name, in_shape=(1,8,8), **kw).eval()
    x = torch.randn(2,1,8,8)
    assert net.fc.in_features==channels and torch.equal(load_model(save_model(net, tmp_path/'net'))(x), net(x))

def test_names_that_a_network_does_not_take():
    with pytest.raises(TypeError, match='resnet8 takes no widht. It takes c, in_shape, kind, width, stem, option. Did you mean .width.'): create('resnet8', widht=.5)
    with pytest.raises(TypeError, match="wrn_16_1 has width=1 by its name. For another: create\\('cifar_resnet', width=…"): create('wrn_16_1', width=.5)

def test_a_fixed_argument_is_fixed():
    with pytest.raises(TypeError, match='depth'): create('resnet20', depth=32)
    with pytest.raises(TypeError, match='depth'): create('wrn_16_1', depth=22)

def test_a_family_of_one_s_own():
    @architecture
    def two_layers(c=10, in_shape=(1,8,8), hidden=5, bias=True):
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(in_shape), hidden), nn.ReLU(), nn.Linear(hidden, c, bias=bias))
    architecture(two_layers, 'two_layers_9', hidden=9)
    try:
        assert create('two_layers_9', c=3).arch == dict(name='two_layers_9', kwargs=dict(c=3, in_shape=(1,8,8), bias=True))
        assert two_layers(4, hidden=2).arch == dict(name='two_layers', kwargs=dict(c=4, in_shape=(1,8,8), hidden=2, bias=True))
        assert create('two_layers_9', bias=False)[1].out_features == 9
    finally: del architectures['two_layers'],architectures['two_layers_9']

class OldBlock(nn.Module):
    "A residual block as a class of its own"
    def __init__(self, ni, n, stride, kind, option):
        super().__init__()
        conv,norm = lambda a,b,k,s: nn.Conv2d(a, b, k, s, k//2, bias=False),nn.BatchNorm2d
        self.kind,self.grows = kind,ni!=n or stride>1
        if kind=='basic':
            self.conv1,self.bn1,self.act1,self.conv2,self.bn2,self.act2 = conv(ni,n,3,stride),norm(n),nn.ReLU(),conv(n,n,3,1),norm(n),nn.ReLU()
            self.shortcut = (nn.Identity() if not self.grows else nn.Sequential(conv(ni,n,1,stride), norm(n)) if option=='B' else
                             nn.Sequential(nn.Identity(), nn.Identity()))
        else:
            plan = [(ni,n//4,1,1),(n//4,n//4,3,stride),(n//4,n,1,1)] if kind=='bottleneck' else [(ni,n,3,stride),(n,n,3,1)]
            for i,(a,b,k,s) in enumerate(plan, 1):
                for name,o in zip(('bn','act','conv'), (norm(a),nn.ReLU(),conv(a,b,k,s))): self.add_module(f'{name}{i}', o)
            if self.grows: self.shortcut = conv(ni,n,1,stride)
    def forward(self, x):
        if self.kind=='basic':
            y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
            s = self.shortcut(x)
            if s.shape!=y.shape: s = F.pad(s[..., ::2, ::2], (0,0,0,0,0,y.shape[1]-s.shape[1]))
            return self.act2(y + s)
        a = y = self.act1(self.bn1(x))
        s = self.shortcut(a) if self.grows else x
        for i in (1,2,3):
            if i>1 and hasattr(self, f'bn{i}'): y = getattr(self, f'act{i}')(getattr(self, f'bn{i}')(y))
            if hasattr(self, f'conv{i}'): y = getattr(self, f'conv{i}')(y)
        return s + y

@pytest.mark.parametrize('kind,depth,option', [('basic',14,'A'), ('basic',14,'B'), ('preact',16,'B'), ('bottleneck',20,'B')])
def test_blocks_are_plain_torch_and_what_they_were_as_classes(kind, depth, option):
    "Names, order and values of the state, names and order of all layers, answers and gradients, in copies and pickles too"
    def net(): set_seed(0); return create('cifar_resnet', kind=kind, depth=depth, option=option, in_shape=(3,12,12)).double()
    new,old = net(),net()
    assert not [m for m in new.modules() if 'kdnb' in type(m).__module__]
    for stage,ni in ((1,16), (2,16), (3,32)):
        wide = 4 if kind=='bottleneck' else 1
        for i,block in enumerate(old.get_submodule(f'layer{stage}')):
            n = wide*16*2**(stage-1)
            own = OldBlock(n if i else 16 if stage==1 else ni*wide, n, 2 if stage>1 and i==0 else 1, kind, option).double()
            own.load_state_dict(block.state_dict())
            old.set_submodule(f'layer{stage}.{i}', own)
    x = torch.randn(4,3,12,12, dtype=torch.double)
    for o in (new, deepcopy(new), pickle.loads(pickle.dumps(new))):
        other = deepcopy(old)
        assert [k for k,_ in o.named_modules()]==[k for k,_ in other.named_modules()]
        assert list(o.state_dict())==list(other.state_dict()) and [k for k,_ in o.named_parameters()]==[k for k,_ in other.named_parameters()]
        assert repr(o)==repr(new) and fingerprint(o)==fingerprint(net())
        for m in (o,other): m.train()(x).square().sum().backward()
        for p,q in zip(o.parameters(), other.parameters()): torch.testing.assert_close(p.grad, q.grad)
        torch.testing.assert_close(o.eval()(x), other.eval()(x))
        assert not o.layer1[0].training

def test_code_that_was_traced_counts_in_a_fingerprint():
    class Sum(nn.Module):
        def __init__(self, f): super().__init__(); self.a,self.f = nn.Linear(2,2),f
        def forward(self, x): return self.f(self.a(x), x)
    a,b = (nn.Sequential(torch.fx.symbolic_trace(Sum(f))) for f in (torch.add, torch.sub))
    b.load_state_dict(a.state_dict())
    assert fingerprint(a)!=fingerprint(b) and fingerprint(a)==fingerprint(deepcopy(a))
