"Groups of channels, removing them, and shrinking: exact for every family of networks, and never wrong."
import itertools, pickle
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torchvision.models as tvm
from torch.nn.utils import parametrize
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from fastai.vision.all import DynamicUnet, OptimWrapper, ResBlock, SGD, Adam, XResNet, create_vision_model
from common import quiet, rest_long
from kdnb.all import *
from kdnb.channels.groups import ChannelGroup,_removable
from kdnb.channels.trial import _silence,_some
from kdnb.channels.labels import OUTPUT
from kdnb.channels.sizes import output_tensors

@contextmanager
def tf32():
    "What enters convolutions and products in float32 has the 10 bits that a GPU's TF32 keeps"
    def rounded(o): return (o.contiguous().view(torch.int32)+0x1000 & ~0x1fff).view(torch.float32) if o.dtype==torch.float32 else o
    def hook(m, xs): return tuple(rounded(o) if isinstance(o, torch.Tensor) else o for o in xs) if isinstance(m, (nn.Linear,nn.modules.conv._ConvNd)) else None
    h = nn.modules.module.register_module_forward_pre_hook(hook)
    try: yield
    finally: h.remove()

BN = nn.modules.batchnorm._BatchNorm

def head(n, c=10): return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, c)]

class UNet(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), norm(16), nn.PReLU(16))
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.last = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    def forward(self, x): a = self.down(x); return self.last(torch.cat([self.up(self.deep(a)), a], 1))

class CatAdd(nn.Module):
    "Two layers side by side, added to a third: one of them may not be emptied although the group is not"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.d = (nn.Conv2d(i, o, 3, padding=1) for i,o in ((3,8), (3,4), (3,12), (12,6)))
        self.out = nn.Sequential(*head(6))
    def forward(self, x):
        both = torch.cat([self.a(x), self.b(x)], 1)
        return self.out(F.relu(self.d(F.relu(both+self.c(x)))))

class Padded(nn.Module):
    "Option A with zeros on both sides, as some have it"
    def __init__(self):
        super().__init__()
        self.stem,self.a,self.b = nn.Conv2d(3, 8, 3, 1, 1),nn.Conv2d(8, 16, 3, 2, 1),nn.Conv2d(16, 16, 3, 1, 1)
        self.out = nn.Sequential(*head(16))
    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.out(F.relu(F.pad(x[:,:,::2,::2], (0,0,0,0,4,4)) + self.b(F.relu(self.a(x)))))

def small_vgg(widths=(16,16,24,24,32,32,32,32), h=40):
    m = vgg(depth=11, widths=list(widths))
    m.fc = nn.Sequential(nn.Linear(widths[-1], h), nn.ReLU(), nn.Linear(h, 10))
    return m

def vit():
    return tvm.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)

def resnet(block, **kwargs): return ResNet(block, [2,1,1,1], num_classes=10, **kwargs)

def mobilenet_v3():
    "With and without squeeze-excite, with both activations, with a shortcut"
    rows = [(16,3,16,16,True,'RE',2,1), (16,3,72,24,False,'RE',2,1), (24,3,88,24,False,'RE',1,1), (24,5,96,40,True,'HS',2,1)]
    return MobileNetV3([InvertedResidualConfig(*o, width_mult=1.) for o in rows], last_channel=64, num_classes=10)

def efficientnet():
    rows = [(1,3,1,32,16,1), (6,3,2,16,24,2), (6,5,2,24,40,1)]
    return EfficientNet([MBConvConfig(*o) for o in rows], dropout=.2, last_channel=64, num_classes=10)

def squeezenet():
    "The first two of the eight fires"
    m = tvm.squeezenet1_1(num_classes=10)
    m.features,m.classifier[1] = m.features[:5],nn.Conv2d(128, 10, 1)
    return m

# Of each family a network with few layers: whole ones are in the zoo.
# builder, number of groups that can go, paths of those that stay
FAMILIES = dict(
    vgg=(small_vgg, 9, ['fc.2']), mlp=(partial(mlp, hidden=40), 7, ['fc5']),
    lenet5=(partial(lenet5, in_shape=(3,32,32)), 4, ['fc3']),
    lenet5_caffe=(partial(lenet5_caffe, in_shape=(3,32,32)), 3, ['fc2']),
    resnet_a=(partial(cifar_resnet, depth=8, option='A'), 4, ['layer2.0.conv2','fc']), padded=(Padded, 2, ['b','out.2']),
    resnet_b=(partial(cifar_resnet, depth=8, option='B'), 6, ['fc']), wrn=(partial(create, 'wrn_10_1'), 6, ['fc']),
    preact_bottleneck=(partial(cifar_resnet, depth=11, kind='bottleneck'), None, None),
    resnet18=(partial(resnet, BasicBlock), 9, ['fc']), resnet50=(partial(resnet, Bottleneck), 15, ['fc']),
    resnext50=(partial(resnet, Bottleneck, groups=32, width_per_group=4), 15, ['fc']),
    mobilenet_v2=(lambda: tvm.MobileNetV2(10, inverted_residual_setting=[[1,16,1,1],[6,24,2,2],[6,32,2,2]]), 9, ['classifier.1']),
    mobilenet_v3=(mobilenet_v3, 11, ['classifier.3']), efficientnet=(efficientnet, 12, ['classifier.1']),
    densenet=(lambda: tvm.DenseNet(8, (3,2), 16, num_classes=10), 12, ['classifier']),
    shufflenet=(lambda: tvm.ShuffleNetV2([2,2,2], [24,48,96,192,128], num_classes=10), 11, None),
    regnet=(lambda: RegNet(BlockParams([1,2], [24,48], [8,8], [1.,1.], [2,2], .25), num_classes=10), 12, ['fc']),
    squeezenet=(squeezenet, 7, ['classifier.1']), xresnet=(partial(XResNet, ResBlock, 1, [1]*4, n_out=10), 10, ['11']),
    xresnet_bottleneck=(partial(XResNet, ResBlock, 4, [1]*4, n_out=10), 15, ['11']),
    vision_learner=(lambda: create_vision_model(lambda pretrained: resnet(BasicBlock), 10, pretrained=False, cut=-2), 10, ['1.8']),
    vit=(vit, 2, ['conv_proj','heads.head']), unet=(lambda: UNet(nn.BatchNorm2d), 4, ['last.3']),
    unet_in=(lambda: UNet(partial(nn.InstanceNorm2d, affine=True)), 4, ['last.3']), cat_add=(CatAdd, 2, ['out.2']))

def lively(m):
    "A network whose BatchNorms are not those of a new one"
    with torch.no_grad():
        for o in m.modules():
            if isinstance(o, BN):
                o.running_mean.normal_(); o.running_var.uniform_(.5, 2)
                o.weight.uniform_(.5, 1.5); o.bias.normal_()
    return m

def build(name):
    set_seed(0)
    return lively(FAMILIES[name][0]()).eval(),torch.randn(2, 3, 32, 32)

def choose(g): return _removable(g, _some(g, torch.randperm(g.n)))
def all_but_one(g): return _removable(g, torch.ones(g.n, dtype=torch.bool))

def mute(m, groups, dead):
    "Set makers and norms of the channels `dead` to zero"
    for g in groups: _silence(m, g, dead[g], ('makers','norms'))
    return m

def widths(m, groups):
    "Outputs of every layer that makes channels of `groups`"
    layers = {p.path: m.get_submodule(p.path) for g in groups for p in g.makers}
    return {p: o.out_features if isinstance(o, nn.Linear) else o.out_channels for p,o in layers.items()}

def expected(m, groups, dead):
    "The same when the channels `dead` are gone"
    res = widths(m, groups)
    for g in groups:
        for p in g.makers: res[p.path] -= int(dead[g][p.unit].sum())
    return res

@pytest.mark.parametrize('name', rest_long(FAMILIES, 'vgg lenet5 resnet_a wrn resnext50 mobilenet_v3 densenet shufflenet vit unet cat_add padded'))
def test_families(name):
    m,x = build(name)
    groups = channel_groups(m, x)
    free,(n,stay) = [g for g in groups if not g.stays],FAMILIES[name][1:]
    if n: assert len(free)==n
    if stay: assert [g.name for g in groups if g.stays]==stay
    dead = {g: choose(g) for g in free}

    unread = deepcopy(m)
    for g in free: _silence(unread, g, dead[g], ['readers'])
    asked = {}
    for g in free:
        for p in g.makers: asked.setdefault(p.path, []).extend(p.at[dead[g][p.unit]].tolist())
    small = remove_channels(m, x, asked)
    assert max_difference(small, unread, x)<=1e-5
    assert widths(small, free)==expected(m, free, dead)

    large = n_params(m)>1e6
    for f in [choose] if large else [choose, all_but_one]:
        dead = {g: f(g) for g in free}
        muted = mute(deepcopy(m), free, dead)
        small = shrink(muted, x)
        assert max_difference(small, muted, x)<=1e-5
        assert widths(small, free)==expected(m, free, dead)
        assert not [k for k in small.stays if k not in [g.name for g in groups if g.stays]]
        if f is choose and not large: assert n_params(shrink(small, x))==n_params(small)    # nothing is left to remove

@pytest.mark.long
@pytest.mark.parametrize('small,large', [
    (partial(small_vgg, (9,12,20,24,25,16,8,31), 33), small_vgg),
    (partial(cifar_resnet, depth=8), partial(cifar_resnet, depth=8, width=2, stem=32)),
    (partial(create, 'resnet18', width=.5), partial(create, 'resnet18'))])
def test_parameters_and_macs_are_those_of_a_network_built_that_size(small, large):
    small,large = small().eval(),large().eval()
    x,shapes = torch.randn(2,3,32,32),[p.shape for p in small.parameters()]
    n = {k: len(p) for k,p in small.state_dict().items() if k.endswith('weight')}
    groups = [g for g in channel_groups(lively(large), x) if not g.stays]
    mute(large, groups, {g: torch.randperm(g.n)>=n[f'{g.makers[-1].path}.weight'] for g in groups})
    s = shrink(large, x)
    assert [p.shape for p in s.parameters()]==shapes
    assert macs(s, x)['']==macs(small, x)[''] and n_params(s)==n_params(small)
    small.load_state_dict(s.state_dict())
    assert max_difference(small, large, x)<=1e-5

def test_members_of_groups():
    m,x = build('resnet_b')
    g = {g.name: g for g in channel_groups(m, x)}
    paths = lambda ps: [p.path for p in ps]
    assert paths(g['conv1'].makers)==['conv1','layer1.0.conv2']
    assert paths(g['conv1'].norms)==['bn1','layer1.0.bn2']
    assert paths(g['conv1'].readers)==['layer1.0.conv1','layer2.0.conv1','layer2.0.shortcut.0']
    assert paths(g['layer2.0.conv1'].readers)==['layer2.0.conv2'] and g['layer2.0.conv1'].n==32
    m = lenet5()
    part, = channel_groups(m, torch.randn(2,1,28,28))['conv2'].readers
    assert (part.at==torch.arange(400)).all() and (part.unit==torch.arange(400)//25).all()
    m,x = build('unet')
    g = {g.name: g for g in channel_groups(m, x)}
    assert g['up'].readers[0].at.tolist()==[*range(8)] and g['down.0'].readers[-1].at.tolist()==[*range(8,16)]
    assert 'up: 8 channels' in repr(g['up']) and 'up' in repr(channel_groups(m, x))

def test_grouped_convolutions_lose_as_many_channels_in_each_block():
    conv = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4), nn.ReLU(), *head(8)).eval()
    x = torch.randn(2,3,9,9)
    g = channel_groups(conv, x)['0']
    assert g.blocks.tolist()==[0,0,0,1,1,1,2,2,2,3,3,3]
    with pytest.raises(ValueError, match='the same number in each of its 4 blocks; asked for 0 to 2'):
        remove_channels(conv, x, {'0': [0,1,3,6]})
    assert remove_channels(conv, x, {'0': [0,4,6,11]})[2].weight.shape==(8,2,3,3)
    m = deepcopy(conv)
    _silence(m, g, torch.tensor([1,1,0,1,0,0,0,0,1,0,1,1]).bool(), ['makers'])
    s = shrink(m, x)
    assert s[0].out_channels==8 and max_difference(s, m, x)<=1e-6
    assert s.stays=={'0': 'a grouped convolution needs as many from each of its blocks'}

class Net(nn.Module):
    def __init__(self, between, out=lambda y,a: y):
        super().__init__()
        self.a,self.between,self.b,self.f,self.out = nn.Conv2d(3,16,3),between,nn.Conv2d(16,8,3),nn.Linear(8,10),out
    def forward(self, x):
        a = self.between(self.a(x))
        return self.out(self.f(F.relu(self.b(a)).mean((2,3))), a)

class Fixed(nn.Module):
    def forward(self, x): return x.reshape(len(x), 16, 30, 30)

@pytest.mark.parametrize('model,why', [
    (Net(nn.GroupNorm(1,16)), 'GroupNorm between normalises over them'),
    (Net(nn.Softmax(1)), 'softmax mixes them'),
    (Net(nn.ReLU(), lambda y,a: (y,a)), "they are the network's output"),
    (Net(nn.Identity(), lambda y,a: dict(y=y, a=a)), "the network's output"),
    (Net(nn.LayerNorm([16,30,30])), 'LayerNorm between normalises over them'),
    (Net(Fixed()), 'counts on their number')])
def test_what_stays(model, why):
    x = torch.randn(2,3,32,32)
    g = channel_groups(model, x)['a']
    assert why in g.stays, g.stays
    _silence(model, g, torch.arange(16)<4, ['makers'])
    s = shrink(model, x)
    assert s.a.out_channels==16 and s.stays['a']==g.stays and max_difference(s, model, x)<=1e-6
    with pytest.raises(ValueError, match="'a' cannot be removed exactly"): remove_channels(model, x, {'a': [0]})

class Recurrent(nn.Module):
    def __init__(self, projected=True):
        super().__init__()
        self.l = nn.Linear(32,24)
        self.g = nn.LSTM(24,20,proj_size=16,batch_first=True) if projected else nn.GRU(24,16,batch_first=True)
        self.h,self.f = nn.Linear(16,20),nn.Linear(20,10)
    def forward(self, x): return self.f(F.relu(self.h(self.g(F.relu(self.l(x[:,0])))[0][:,-1])))

def test_recurrent_layers_between_linear_ones():
    m,x = Recurrent(),torch.randn(2,3,32,32)
    with torch.no_grad():
        for t in (m.h.weight[:,3], m.h.weight[:5], m.h.bias[:5], m.l.weight[:4], m.l.bias[:4]): t.zero_()
    s = shrink(m, x)
    assert s.h[1].weight.shape==(15,15) and s.l.out_features==s.g.input_size==20 and not s.stays
    assert max_difference(s, m, x)<=1e-6
    m = Recurrent(False)
    with torch.no_grad():
        for t in (m.l.weight[:4], m.l.bias[:4]): t.zero_()
    s = shrink(m, x)
    assert s.l.out_features==s.g.input_size==20 and not s.stays and max_difference(s, m, x)<=1e-6

class Untraced(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(8,6),nn.Linear(6,4)
    def forward(self, x): return self.b(self.a(x)).argmax(1)

def test_a_network_without_gradient():
    m,x = Untraced(),torch.randn(5,8)
    with torch.no_grad(): m.a.weight[:,:3] = 0; m.b.weight[:,2] = 0
    assert [(g.name,g.stays) for g in channel_groups(m, x)]==[('a',None), ('b','argmax mixes them')]
    s = shrink(m, x)
    assert s.a[1].weight.shape==(5,5) and s.b.in_features==5

def test_tied_weights_stay():
    m = nn.Sequential(nn.Linear(6,6), nn.ReLU(), nn.Linear(6,6), nn.ReLU(), nn.Linear(6,3))
    m[2].weight = m[0].weight
    assert 'shares its weight' in channel_groups(m, torch.randn(2,6))['0'].stays

def test_zeros_must_arrive():
    x = torch.randn(64,6)
    def net(*between):
        m = nn.Sequential(nn.Linear(6,8), *between, nn.Linear(8,3)).eval()
        with torch.no_grad(): m[0].weight[:3] = 0; m[0].bias[:3] = 0
        return m
    assert shrink(net(nn.ReLU()), x)[0].out_features==5
    for f in (nn.Sigmoid(), nn.Softplus()):
        s = shrink(net(f), x)
        assert s[0].out_features==8 and s.stays=={'0': 'what is constant in them does not arrive as zero'}
    bn = lively(nn.BatchNorm1d(8))
    with torch.no_grad(): bn.bias[:3] = 5
    assert shrink(net(bn, nn.ReLU()), x)[0].out_features==8
    with torch.no_grad(): bn.weight[:2] = 0; bn.bias[:2] = 0
    assert shrink(net(bn, nn.ReLU()), x)[0].out_features==6
    m = net(lively(nn.BatchNorm1d(8)), nn.ReLU())       # a slimmed norm is enough, whatever the layer says
    with torch.no_grad(): m[0].weight.normal_(); m[1].weight[:2] = 0; m[1].bias[:2] = 0
    assert shrink(m, x)[0].out_features==6

def test_a_neuron_that_sleeps_through_the_batch_is_not_dead():
    m = nn.Sequential(nn.Linear(6,8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8,3)).eval()
    with torch.no_grad():
        m[0].bias[:4] = -100; m[1].weight[:2] = 0; m[1].bias[:2] = -1; m[0].weight[6] = 0; m[0].bias[6] = 0
    s = shrink(m, torch.randn(32,6))
    assert s[0].out_features==5     # 0 and 1 give max(-1, 0) always, 6 gives 0 always; 2 and 3 only sleep

def test_one_death_leads_to_others():
    m = nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,8), nn.ReLU(), nn.Linear(8,8), nn.ReLU(), nn.Linear(8,3))
    with torch.no_grad():
        m[6].weight[:,:5] = 0; m[4].weight[5:,:4] = 0; m[2].weight[4:,:2] = 0
        m[0].weight[7] = 0; m[0].bias[7] = 0; m[2].weight[7,:7] = 0; m[2].bias[7] = 0
    s = shrink(m, torch.randn(4,6))
    assert [o.out_features for o in s[::2]]==[5,3,3,3] and s.stays=={}

@pytest.mark.parametrize('name', ['vgg','resnet_b','mobilenet_v2','unet','vit','resnext50'])
def test_all_zero(name):
    m,x = build(name)
    with torch.no_grad():
        for p in m.parameters(): p.zero_()
    s = shrink(m, x)
    assert max_difference(s, m, x)==0 and all(p.numel() for p in s.parameters()) and n_params(s)<n_params(m)

@pytest.mark.parametrize('channels,says', [
    ({'bn1': [0]}, "no convolution or linear layer 'bn1' runs"), ({'nowhere': [0]}, "'nowhere' runs in this network"),
    ({'conv1': [3,16]}, "'conv1' has 16 output channels, 0 to 15; asked to remove 3 to 16"),
    ({'conv1': [-1]}, '0 to 15; asked to remove -1'),
    ({'fc': [1]}, "'fc' cannot be removed exactly: they are the network's")])
def test_remove_channels_refuses(channels, says):
    with pytest.raises(ValueError, match=says): remove_channels(*build('resnet_b'), channels)

def test_remove_channels_never_empties_a_layer():
    m,x = build('resnet_b')
    with pytest.warns(UserWarning, match="16 of the 16 channels of 'conv1' were to go; kept: 1,"):
        s = remove_channels(m, x, {'conv1': range(16)})
    assert s.conv1.out_channels==1 and s.layer1[0].conv2.out_channels==1 and m.conv1.out_channels==16
    assert s(x).shape==(2,10) and remove_channels(m, x, {}).conv1.out_channels==16
    s = remove_channels(m, x, {'conv1': torch.tensor([0,2]), 'layer1.0.conv2': [1]})      # two names of one group
    assert s.conv1.out_channels==13
    assert remove_channels(m, x, {'conv1': torch.arange(16)<5}).conv1.out_channels==11        # a mask
    with pytest.warns(UserWarning, match='were to go'): s = remove_channels(*build('cat_add'), {'b': range(4)})
    assert (s.a.out_channels,s.b.out_channels,s.c.out_channels)==(8,1,9)

class Mask(nn.Module):
    def __init__(self, mask): super().__init__(); self.register_buffer('mask', mask)
    def forward(self, w): return w*self.mask

def attached(m, groups, dead):
    "`{parameter: mask}` of makers, norms and readers"
    res = {}
    for g in groups:
        for name,off in g.traces(m, dead[g]): res[name] = res.get(name, True) & ~off.expand_as(m.get_parameter(name))
    return res

def parametrized(m, groups, dead):
    for name,mask in attached(m, groups, dead).items():
        path,_,n = name.rpartition('.')
        parametrize.register_parametrization(m.get_submodule(path), n, Mask(mask.float()))
    return m

def with_masks(m, groups, dead): return mask_model(m, attached(m, groups, dead))

def masked(name='resnet_b', attach=parametrized):
    m,x = build(name)
    groups = [g for g in channel_groups(m, x) if not g.stays]
    return attach(m, groups, {g: choose(g) for g in groups}),x,groups

def state(m):
    return ({k: v.clone() for k,v in m.state_dict().items()}, [o.training for o in m.modules()],
            [p.requires_grad for p in m.parameters()])

def same(a, b): return a[1:]==b[1:] and a[0].keys()==b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])

@pytest.mark.parametrize('attach', [parametrized, with_masks])
def test_masks_are_folded_and_the_original_is_untouched(attach):
    m,x,groups = masked(attach=attach)
    m.train(); m.layer1[0].eval(); m(x).sum().backward()
    grads,before,rng = [p.grad.clone() for p in m.parameters()],state(m),torch.get_rng_state()
    y = deepcopy(m).eval()(x)
    assert [g.name for g in channel_groups(m, x) if not g.stays]==[g.name for g in groups]
    s = shrink(m, x)
    assert same(state(m), before) and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p.grad, g) for p,g in zip(m.parameters(), grads))
    assert not any(parametrize.is_parametrized(o) or isinstance(o, Masked) for o in s.modules())
    assert all(p.grad is None for p in s.parameters())
    assert s.training and not s.layer1[0].training and not s.layer1[0].bn1.training and s.layer2[0].bn1.training
    assert [n for n,_ in s.named_parameters()]==[n for n,_ in FAMILIES['resnet_b'][0]().named_parameters()]
    assert torch.equal(m.eval()(x), y) and max_difference(s, m, x)<=1e-5 and n_params(s)<.6*n_params(m)

@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_frozen_networks_and_contexts(context):
    m,x,_ = masked()
    for i,p in enumerate(m.parameters()): p.requires_grad_(i%3==0)
    with context(): s = shrink(m, x)
    grad = {n.replace('parametrizations.','').replace('.original',''): p.requires_grad for n,p in m.named_parameters()}
    assert {n: p.requires_grad for n,p in s.named_parameters()}==grad
    with context(): s = shrink(m.eval().requires_grad_(False), x)
    assert not any(p.requires_grad for p in s.parameters()) and not s.training and s.conv1.out_channels<16

def test_the_result_is_plain():
    m,x,_ = masked('mobilenet_v2')
    s = shrink(m, x)
    assert not [o for o in s.modules() if 'kdnb' in type(o).__module__ or o._forward_hooks or o._forward_pre_hooks]
    for copy in (pickle.loads(pickle.dumps(s)), deepcopy(s)):
        copy.load_state_dict(s.state_dict())
        assert torch.equal(copy(x), s(x)) and copy.stays==s.stays
    s.train()
    opt = torch.optim.SGD(s.parameters(), .1, momentum=.9)
    s(torch.randn(4,3,32,32)).sum().backward(); opt.step()
    assert all(p.grad is not None and p.grad.shape==p.shape for p in s.parameters())

def test_tuple_outputs_are_compared():
    a,b = Net(nn.ReLU(), lambda y,a: (y,a)),Net(nn.ReLU(), lambda y,a: (y,a+1))
    b.load_state_dict(a.state_dict())
    assert max_difference(a, b, torch.randn(2,3,8,8))>.1

def test_a_network_that_differs_is_not_returned():
    calls = itertools.count()
    m = Net(nn.ReLU(), lambda y,a: y+next(calls))
    with pytest.raises(ValueError, match='differs from the masked one'): shrink(m, torch.randn(2,3,8,8))

def test_index_layers_are_cut_again():
    m,x = lenet300(in_shape=(1,8,8)),torch.randn(4,1,8,8)
    with torch.no_grad(): m.fc1.weight[:,::2] = 0
    s = shrink(m, x)
    with torch.no_grad(): s.fc1[1].weight[:,:8] = 0
    t = shrink(s, x)
    assert t.fc1[0].index.tolist()==[*range(17,64,2)] and t.fc1[1].in_features==24
    assert t.state_dict().keys()==s.state_dict().keys() and max_difference(t, s, x)<=1e-6

def test_bn_statistics_can_be_estimated_anew():
    dls = image_dls()
    m = nn.Sequential(nn.Conv2d(1,8,3), nn.BatchNorm2d(8), nn.ReLU(), *head(8))
    m[3].eval()
    s = shrink(m, dls, update_bn=2)
    assert s[1].num_batches_tracked==2 and m[1].num_batches_tracked==0 and s[1].momentum==.1
    assert s.training and not s[3].training
    assert (s[1].running_mean-m[1].running_mean).abs().max()>.01
    for update_bn,dl in ((True, dls.train), (dls.valid, dls.valid)):
        assert shrink(m, dls, update_bn=update_bn)[1].num_batches_tracked==len(dl)
    with pytest.raises(ValueError, match='counts training batches'): shrink(m, dls.one_batch()[0], update_bn=3)


OPTS = dict(sgd=partial(SGD, mom=.9, wd=1e-2), adam=Adam,
            torch_sgd=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9),
            torch_adam=partial(OptimWrapper, opt=torch.optim.AdamW))

def masked_learner(opt_func, attach=parametrized):
    set_seed(0)
    dls = image_dls(bs=64)
    m = nn.Sequential(nn.Conv2d(1,12,3,padding=1,bias=False), nn.BatchNorm2d(12), nn.ReLU(),
                      nn.Conv2d(12,16,3), nn.ReLU(), nn.Flatten(), nn.Linear(16*36,30), nn.ReLU(), nn.Linear(30,10))
    x = dls.one_batch()[0]
    with torch.no_grad(): m[6].weight[:,5::36] = 0
    groups = [g for g in channel_groups(m, x) if not g.stays]
    attach(m, groups, {g: choose(g) for g in groups})
    def splitter(m): return L(L(m[:4].parameters()), L(m[4:].parameters()))
    return Learner(dls, m, opt_func=opt_func, splitter=splitter, lr=1e-2)

@pytest.mark.parametrize('attach', [parametrized, with_masks])
@pytest.mark.parametrize('opt', OPTS)
def test_training_goes_on_in_the_shrunken_network(opt, attach):
    learn = masked_learner(OPTS[opt], attach)
    quiet(learn, 1, slice(1e-3,1e-2))
    m,old = learn.model,learn.opt
    with learn.no_bar(), learn.no_logging(): s = learn.shrink()
    assert learn.model is s and learn.opt is not old and n_params(s)<.6*n_params(m)
    assert [dict(h) for h in learn.opt.hypers]==[dict(h) for h in old.hypers] and len(learn.opt.param_lists)==2
    assert {id(p) for ps in learn.opt.param_lists for p in ps}=={id(p) for p in s.parameters()}
    x,y = (o.as_subclass(torch.Tensor) for o in learn.dls.one_batch())
    for _ in range(2):
        for model,o in ((m,old), (s,learn.opt)):
            F.cross_entropy(model.train()(x), y).backward()
            o.step(); o.zero_grad()
        ref = shrink(m, x).state_dict()
        for k,v in s.state_dict().items():
            assert ref[k].shape==v.shape and torch.allclose(ref[k].float(), v.float(), atol=1e-6), k
    quiet(learn, 1)
    quiet(learn, fit='validate')

def test_shrinking_a_learner_that_has_not_trained():
    learn = masked_learner(SGD)
    s = learn.shrink(update_bn=3)
    assert learn.opt is None and learn.model is s and s[1].num_batches_tracked==3
    quiet(learn, 1)

def test_shrinking_a_frozen_learner():
    learn = masked_learner(Adam)
    learn.freeze()
    s = learn.shrink()
    assert learn.opt.frozen_idx==1 and not s[0].weight.requires_grad and s[8].weight.requires_grad
    learn.unfreeze()
    assert s[0].weight.requires_grad

def test_an_optimiser_built_by_hand():
    learn = masked_learner(SGD)
    learn.opt_func = OptimWrapper(opt=torch.optim.SGD(learn.model.parameters(), .1))
    with pytest.raises(ValueError, match='built by hand'): learn.shrink()

def test_a_shrunken_network_is_looked_at_quietly(capfd):
    "The maps of a network whose flattened pixels are picked by number stay, and torch.fx says nothing of the trial"
    dls = image_dls('digits')
    v = to_variational(create('lenet5', dls), dls, 'channels')
    with torch.no_grad():
        for g in noise_groups(v).values(): g.gamma_logvar[::3] = 9.
    small = shrink(to_deterministic(v, 0.), dls)
    again = shrink(small, dls)
    assert any('KeepInputs' in type(m).__name__ for m in small.modules()) and capfd.readouterr().err==''
    xb = dls.one_batch()[0]
    test_close(again.eval()(xb), small.eval()(xb), 1e-5)

def test_max_difference_says_only_what_it_knows():
    class Says(nn.Module):
        def __init__(self, *out): super().__init__(); self.out = out
        def forward(self, x): return self.out
    x,nan = torch.ones(2),torch.full((2,), math.nan)
    assert math.isnan(max_difference(Says(x,x), Says(x,nan), x)) and math.isnan(max_difference(Says(x,x), Says(nan,x), x))
    assert (max_difference(Says(x>0), Says(x>0), x),max_difference(Says(x>0), Says(x>1), x))==(0,1)
    with pytest.raises(ValueError, match='gives no tensors'): max_difference(Says('a'), Says('b'), x)

def test_masks_hold_after_learn_shrink():
    dls = image_dls('digits', bs=256)
    learn = Learner(dls, create('lenet300', dls, hidden=(30,20)), opt_func=SGD)
    holds = {'fc1.weight': torch.rand(30,64)<.4, 'fc1.bias': torch.arange(30)>3, 'fc2.weight': torch.rand(20,30)<.4}
    holds['fc1.weight'][:4] = holds['fc1.weight'][:,:5] = 0
    mask_model(learn.model, holds)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        small = learn.shrink()
        assert [tuple(w.shape) for w in prunable(small).values()]==[(26,59),(20,26),(10,20)]
        assert set(masks(small))=={'fc1.1.weight','fc2.weight'}         # nothing is left to hold in the bias
        before,zeros = sparsity(small),small.fc1[1].weight==0
        learn.fit(1, 1e-2)
    assert before>.4 and sparsity(small)==before and torch.equal(small.fc1[1].weight==0, zeros)
    assert max_difference(plain_copy(small), small, dls)==0


def halved(m, x):
    "The network with half the channels of each group at zero, and its shrunken copy"
    groups = [g for g in channel_groups(m, x) if not g.stays]
    s = copy_network(m)
    for g in groups: _silence(s, g, choose(g))
    return s,shrink(s, x)

def check_shrunken(m, x, least=.9, pickled=True):
    "Half of the channels go exactly, and the small network trains, is copied and pickled"
    s,small = halved(m, x)
    assert max_difference(small, s, x)<1e-10 and n_params(small)<least*n_params(m)
    for copy in (small, copy_network(small), *([pickle.loads(pickle.dumps(small))] if pickled else [])):
        copy.train()
        sum(o.float().sum() for o in output_tensors(copy(*(x if isinstance(x, tuple) else (x,)))) if o.requires_grad).backward()
        assert sum(p.grad is not None for p in copy.parameters())>len([*copy.parameters()])//2
    return s,small

@pytest.mark.parametrize('name', ['vgg','resnet_b','resnet18','densenet','mobilenet_v2'])
def test_a_proof_does_not_depend_on_how_the_device_rounds(name):
    m,x = build(name)
    with tf32():
        groups = channel_groups(m, x)
        assert [g.name for g in groups if g.stays]==FAMILIES[name][2]
        muted = mute(deepcopy(m), groups, {g: choose(g) if not g.stays else torch.zeros(g.n, dtype=torch.bool) for g in groups})
        assert shrink(muted, x) is not None and n_params(shrink(muted, x))<.6*n_params(m)

@pytest.mark.cuda
@pytest.mark.parametrize('name', ['vgg','resnet_b','resnet18','densenet','mobilenet_v2','efficientnet'])
def test_shrinking_on_a_gpu(name):
    m,x = build(name)
    m,x = m.cuda(),x.cuda()
    s,small = halved(m, x)
    assert max_difference(small, s, x)<1e-10 and n_params(small)<.6*n_params(m) and next(small.parameters()).is_cuda

class SE(nn.Module):
    def __init__(self, c, e=20):
        super().__init__()
        def conv(i, o, k=1, g=1, act=nn.SiLU): return nn.Sequential(nn.Conv2d(i, o, k, padding=k//2, groups=g, bias=False), nn.BatchNorm2d(o), act())
        self.a,self.d,self.b = conv(c, c*e),conv(c*e, c*e, 3, c*e),conv(c*e, c, act=nn.Identity)
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c*e, c//4, 1), nn.SiLU(), nn.Conv2d(c//4, c*e, 1), nn.Sigmoid())
    def forward(self, x): y = self.d(self.a(x)); return x+self.b(y*self.se(y))

@pytest.mark.long
def test_a_deep_network_is_tried_in_float64():
    m = nn.Sequential(nn.Conv2d(3,16,3), nn.BatchNorm2d(16), *[SE(16) for _ in range(30)], *head(16))
    assert [g.name for g in channel_groups(m, torch.randn(2,3,8,8)) if g.stays]==['34']
    check_shrunken(m, torch.randn(2,3,8,8), .6)

class CrossStage(nn.Module):
    def __init__(self, c):
        super().__init__()
        def conv(i, o, k): return nn.Sequential(nn.Conv2d(i, o, k, padding=k//2, bias=False), nn.BatchNorm2d(o), nn.SiLU())
        self.exp,self.a,self.b,self.out = conv(c,16,1),conv(8,8,1),conv(8,8,3),conv(16,c,1)
    def forward(self, x):
        a,b = self.exp(x).split(8, dim=1)
        return self.out(torch.cat([a+self.b(self.a(a)), b], 1))

def test_a_cross_stage_block_holds_only_what_it_splits():
    m = nn.Sequential(nn.Conv2d(3,12,3), nn.BatchNorm2d(12), CrossStage(12), nn.Conv2d(12,12,3), *head(12))
    x = torch.randn(2,3,8,8)
    assert {g.name for g in channel_groups(m, x) if g.stays}=={'2.exp.0','6'}
    check_shrunken(m, x)

class Ghost(nn.Module):
    def __init__(self):
        super().__init__()
        self.primary,self.cheap = nn.Conv2d(3,8,1),nn.Conv2d(8,8,3,padding=1,groups=8)
        self.dw,self.out,self.fc = nn.Conv2d(16,16,3,padding=1,groups=16),nn.Conv2d(16,6,1),nn.Linear(6,10)
    def forward(self, x):
        x = self.primary(x).relu()
        return self.fc(self.out(self.dw(torch.cat([x, self.cheap(x)], 1)).relu()).relu().mean((2,3)))

def test_a_ghost_module():
    x = torch.randn(2,3,8,8)
    g = channel_groups(Ghost(), x)['primary']
    assert not g.stays and [p.path for p in g.makers]==['primary','cheap','dw']
    assert check_shrunken(Ghost(), x)[1].dw.groups==12         # a third of 8 channels, each in two places

class ECA(nn.Module):
    def __init__(self, c): super().__init__(); self.a,self.eca,self.b = nn.Conv2d(3,c,1),nn.Conv1d(1,1,3,padding=1,bias=False),nn.Conv2d(c,10,1)
    def forward(self, x):
        x = self.a(x)
        return self.b(x*self.eca(x.mean((2,3)).view(len(x),1,-1)).sigmoid().view(len(x),-1,1,1)).mean((2,3))

def test_channels_whose_neighbours_are_read_stay():
    gs = channel_groups(ECA(4096), torch.randn(2,3,8,8))
    assert [(g.name,g.n,bool(g.stays)) for g in gs]==[('a',4096,True), ('eca',1,True), ('b',10,True)]

class Keeps(nn.Module):
    def __init__(self): super().__init__(); self.c1,self.c2,self.fc = ConvLayer(1,16),ConvLayer(16,32,stride=2),nn.Linear(32,10)
    def forward(self, x):
        self.kept = [self.c2(self.c1(x))]
        self.kept += [dict(mean=self.kept[0].mean((2,3)))]
        return self.fc(self.kept[1]['mean'])

def test_a_network_that_keeps_activations():
    dls = image_dls('digits', bs=256)
    learn = Learner(dls, Keeps(), metrics=accuracy)
    learn.model.train()(dls.one_batch()[0]).sum().backward()          # what it keeps hangs on a gradient
    assert len(channel_groups(learn.model, dls))==3
    quiet(learn, 1, 1e-3, cbs=Pruner(.5, by='channel'))
    learn.model.train()(dls.one_batch()[0])
    assert learn.shrink().c1[0].out_channels==8
    quiet(learn, 1, 1e-3)

def test_fastai_unet():
    x = torch.randn(2,3,32,32)
    m = DynamicUnet(nn.Sequential(*[ConvLayer(i, o, stride=2) for i,o in ((3,8),(8,16),(16,32))]), 2, (32,32))
    m.train()(x)                                                      # its hooks keep the maps of the encoder
    s,small = check_shrunken(m, x, .6)

class Aux(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = ConvLayer(1,16),ConvLayer(16,32,stride=2)
        self.fc,self.aux = nn.Linear(32,10),nn.Linear(16,10)
    def forward(self, x):
        h = self.a(x)
        y = self.fc(self.b(h).mean((2,3)))
        return (y, self.aux(h.mean((2,3)))) if self.training else y

@pytest.mark.parametrize('kinds', [('makers','norms'), ('makers','norms','readers'), ('readers',)])
def test_heads_that_run_in_training_only(kinds):
    m,x = lively(Aux()),torch.randn(8,1,8,8)
    groups = channel_groups(m, x)
    assert 'aux' in [p.path for p in groups['a.0'].readers]
    for g in groups:
        if not g.stays: _silence(m, g, torch.arange(g.n)%2==0, kinds)
    s = shrink(m.eval(), x)
    assert (s.a[0].out_channels,s.aux.in_features,s.fc.in_features)==(8,8,16)
    m,s = m.double().train(),s.double().train()
    assert all(torch.allclose(a, b) for a,b in zip(m(x.double()), s(x.double())))

def test_a_training_head_that_still_reads_keeps_the_channel():
    m,x = lively(Aux()).eval(),torch.randn(8,1,8,8)
    with torch.no_grad(): m.b[0].weight[:,:4] = 0          # the evaluation ignores them, the head does not
    assert shrink(m, x).a[0].out_channels==16

@pytest.mark.long
def test_googlenet_trains_on():
    x = torch.randn(4,3,64,64)
    s,small = check_shrunken(tvm.googlenet(init_weights=False, num_classes=10), x, .5)
    assert len(small.train()(x))==3

class StepConv(nn.Conv2d):
    "One learned step for the whole layer"
    def __init__(self, *args): super().__init__(*args); self.step = nn.Parameter(torch.tensor([.05]))
    def forward(self, x): return self._conv_forward(x, self.weight + ((self.weight/self.step).round()*self.step - self.weight).detach(), self.bias)
class InScale(nn.Conv2d):
    def __init__(self, *args): super().__init__(*args); self.scale = nn.Parameter(torch.rand(1,self.in_channels,1,1)+.5)
    def forward(self, x): return super().forward(x*self.scale)
class OutScale(nn.Conv2d):
    def __init__(self, *args): super().__init__(*args); self.scale = nn.Parameter(torch.rand(self.out_channels,1,1)+.5)
    def forward(self, x): return super().forward(x)*self.scale
class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        return F.conv2d(x, (w-w.mean((1,2,3), keepdim=True))/(1e-5+w.std((1,2,3), keepdim=True)), self.bias)
class LoRA(nn.Conv2d):
    def __init__(self, i, o, k): super().__init__(i, o, k); self.A,self.B = nn.Parameter(torch.randn(4,i)),nn.Parameter(torch.randn(o,4))
    def forward(self, x): return super().forward(x) + F.conv2d(x[:,:,1:-1,1:-1], (self.B@self.A)[:,:,None,None])

@pytest.mark.parametrize('cls,free', [(StepConv,2), (InScale,2), (OutScale,2), (Standardised,1), (LoRA,1)])
def test_subclasses_with_parameters_of_their_own(cls, free):
    x = torch.randn(2,3,16,16)
    m = nn.Sequential(nn.Conv2d(3,12,3), nn.ReLU(), cls(12,16,3), nn.ReLU(), nn.Conv2d(16,8,3))
    assert sum(not g.stays for g in channel_groups(m, x))==free
    check_shrunken(m, x, .95)
    same = nn.Sequential(nn.Conv2d(3,16,3), nn.ReLU(), cls(16,16,3), nn.ReLU(), nn.Conv2d(16,8,3))      # whose axis is it?
    assert sum(not g.stays for g in channel_groups(same, x))==(2 if cls is StepConv else 1 if cls is Standardised else 0)

class Gives(nn.Module):
    def __init__(self, out): super().__init__(); self.a,self.b,self.c,self.out = nn.Linear(8,16),nn.Linear(16,16),nn.Linear(16,4),out
    def forward(self, x): return self.out(self.c(self.b(self.a(x).relu()).relu()))

@dataclass
class Output: logits:torch.Tensor; loss:torch.Tensor=None; name:str='a'

@pytest.mark.parametrize('out', [lambda y: dict(y=y), lambda y: (y,None), lambda y: [y,4,'name'], lambda y: dict(y=y, n=4, more=[dict(y=y.exp())]), lambda y: Output(y)])
def test_what_is_no_tensor_among_outputs_is_passed_over(out):
    m,x = Gives(out),torch.randn(3,8)
    assert channel_groups(m, x).table().stays.tolist()==['','',OUTPUT]
    check_shrunken(m, x, pickled=False)

class Boxes(nn.Module):
    "Boxes whose score is high enough; there may be none"
    def __init__(self, t):
        super().__init__()
        self.body,self.score,self.box,self.t = nn.Sequential(ConvLayer(3,16), ConvLayer(16,16)),nn.Conv2d(16,1,1),nn.Conv2d(16,4,1),t
    def forward(self, x): f = self.body(x); return self.box(f).permute(0,2,3,1)[self.score(f).sigmoid()[:,0]>self.t]

@pytest.mark.parametrize('t', [.3,1.])
def test_no_boxes_are_found(t):
    m,x = Boxes(t).eval(),torch.randn(2,3,16,16)
    assert max_difference(m, m, x)==0 and all(g.stays for g in channel_groups(m, x) if g.name in ('score','box'))
    s,small = halved(m, x)
    assert small.body[0][0].out_channels<16 and max_difference(small, s, x)<1e-12

def test_an_empty_selection_holds_what_nobody_was_seen_to_read():
    class Late(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(8,16),nn.Linear(16,4),nn.Linear(16,4)
        def forward(self, x):
            h = self.a(x)
            return self.b(h), self.c(h[x.sum(1)>1e6])
    assert channel_groups(Late(), torch.randn(4,8))['a'].stays=='nothing of them was left in this batch'

class Dicts(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(8,16),nn.Linear(16,4)
    def forward(self, x): return self.b(self.a(x['x']).relu())
class Lists(Dicts):
    def forward(self, xs): return torch.stack([self.b(self.a(o).relu().mean(0)) for o in xs])

@pytest.mark.parametrize('cls,x', [(Dicts, (dict(x=torch.randn(4,8)),)), (Lists, ([torch.randn(3,8), torch.randn(5,8)],))])
def test_inputs_in_dicts_and_lists(cls, x):
    m = cls()
    check_shrunken(m, x)
    assert macs(m, x)['']>0 and cost(m, x).loc['total','weights']==192

class VAE(nn.Module):
    def __init__(self): super().__init__(); self.e,self.mu,self.lv,self.d,self.o = nn.Linear(8,16),nn.Linear(16,4),nn.Linear(16,4),nn.Linear(4,16),nn.Linear(16,8)
    def forward(self, x):
        h = self.e(x).relu()
        z = self.mu(h)+torch.randn_like(self.mu(h))*self.lv(h).exp()
        return self.o(F.dropout(self.d(z).relu(), .5, True)),z

def test_networks_that_draw_random_numbers_in_evaluation():
    m,x = VAE(),torch.randn(4,8)
    rng = torch.get_rng_state()
    assert max_difference(m, m, x)==0 and torch.equal(torch.get_rng_state(), rng)
    s,small = halved(m, x)
    assert (small.e.out_features,small.d.out_features)==(11,11) and max_difference(small, s, x)<1e-12
    assert not torch.equal(small(x)[0], small(x)[0])                   # and it goes on drawing

def _weight_norms():
    from torch.nn.utils import parametrizations as new, spectral_norm, weight_norm
    from torch.nn.utils import prune
    def pruned(m): prune.ln_structured(m, 'weight', .5, n=1, dim=0); prune.l1_unstructured(m, 'bias', .5); return m
    return dict(weight_norm=new.weight_norm, spectral_norm=new.spectral_norm, old_weight_norm=weight_norm, old_spectral_norm=spectral_norm, pruned=pruned)

@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('training', [False,True])
@pytest.mark.parametrize('name', _weight_norms())
def test_computed_weights_are_seen_through(name, training):
    norm,x = _weight_norms()[name],torch.randn(3,4,20)
    m = nn.Sequential(norm(nn.Conv1d(4,16,3,padding=1)), nn.ReLU(), norm(nn.Conv1d(16,16,3,padding=1)), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16,3))
    m(x)
    m.train(training)
    before = {k: v.clone() for k,v in m.state_dict().items()}
    assert [g.name for g in channel_groups(m, x) if not g.stays]==['0','2']
    s = shrink(m, x)
    assert max_difference(s, m, x)<1e-10 and type(s[0]) is nn.Conv1d and not s[0]._forward_pre_hooks
    assert s.training==training and all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and m.state_dict().keys()==before.keys()
    if name=='pruned': assert s[0].out_channels<16
    assert [n for n,_ in s.named_parameters()]==['0.weight','0.bias','2.weight','2.bias','6.weight','6.bias']

def test_a_trace_has_a_bound_in_time():
    m,x = build('resnet_b')
    groups = channel_groups(m, x, seconds=0)
    assert {g.stays for g in groups}=={'there was no time to try them', OUTPUT} and len(groups)==7

class Grouped(nn.Module):
    "Attention with grouped queries and rotary positions, RMSNorm, a gated MLP, and None beside the logits"
    def __init__(self, d=32, heads=4, kv=2, n=20):
        super().__init__()
        self.d,self.heads,self.kv,self.size = d,heads,kv,d//heads
        self.emb,self.w1,self.w2 = nn.Embedding(n, d),nn.Parameter(torch.ones(d)),nn.Parameter(torch.ones(d))
        self.q,self.k,self.v,self.o = (nn.Linear(d, o, bias=False) for o in (d, kv*self.size, kv*self.size, d))
        self.gate,self.up,self.down,self.head = nn.Linear(d,64),nn.Linear(d,64),nn.Linear(64,d),nn.Linear(d,n)
    def rotate(self, x):
        f = torch.outer(torch.arange(x.shape[2]), 1e4**(-torch.arange(0, self.size, 2)/self.size)).to(x)
        a,b = x.chunk(2, -1)
        return x*f.cos().repeat(1,2) + torch.cat([-b,a], -1)*f.sin().repeat(1,2)
    def forward(self, ids):
        x = self.emb(ids)
        y = self.w1*x*(x.pow(2).mean(-1, keepdim=True)+1e-6).rsqrt()
        q,k,v = (f(y).view(*ids.shape, -1, self.size).transpose(1, 2) for f in (self.q,self.k,self.v))
        k,v = (o[:,:,None].expand(-1,-1,self.heads//self.kv,-1,-1).flatten(1, 2) for o in (self.rotate(k),v))
        x = x + self.o(F.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.w2*x*(x.pow(2).mean(-1, keepdim=True)+1e-6).rsqrt()
        return dict(logits=self.head(x+self.down(F.silu(self.gate(y))*self.up(y))), past=None)

def test_grouped_query_attention_and_rotary_positions():
    m,x = Grouped(),torch.randint(0, 20, (2,7))
    assert channel_groups(m, x)['gate'].stays is None
    assert halved(m, x)[1].up.out_features==43

@pytest.mark.long
def test_a_detector():
    m,x = tvm.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval(),([torch.rand(3,320,320)],)
    assert sum(not g.stays for g in channel_groups(m, x))>30

def test_code_that_reads_a_linear_layer():
    "An index layer in its place would have no weight"
    class Reads(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(8,6),nn.Linear(6,3)
        def forward(self, x): return self.b(self.a(x).relu()) + 0*self.a.weight.sum()
    m,x = Reads(),torch.randn(4,8)
    with torch.no_grad(): m.a.weight[:,:3] = 0; m.b.weight[:,1] = 0
    s = shrink(m, x)
    assert s.a.weight.shape==(5,8) and max_difference(s, m, x)<1e-12

def test_the_first_layer_that_differs_is_named():
    class Turns(nn.Module):
        "Another function at each call, so that nothing equals it"
        calls = itertools.count()
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(4,5),nn.Linear(5,2)
        def forward(self, x): return self.b(self.a(x)+next(self.calls))
    with pytest.raises(ValueError, match='first at b. Please report'): shrink(Turns(), torch.randn(3,4))

def test_differences_are_relative_and_exact():
    a,b = nn.Linear(4,3),nn.Linear(4,3)
    b.load_state_dict({k: v*(1+1e-7) for k,v in a.state_dict().items()})
    x = torch.randn(5,4)
    for scale in (1,1e-6,1e6):
        for m in (a, b):
            for p in m.parameters(): p.data.mul_(scale)
        assert 1e-8<max_difference(b, a, x)<1e-6

@pytest.mark.parametrize('how', ['lstm','attention','torch','weight_norm'])
def test_masks_of_every_kind_hold_after_learn_shrink(how):
    from torch.nn.utils import parametrizations, prune
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.out = nn.Linear(64,24),nn.Linear(16,10)
            self.mid = dict(lstm=lambda: nn.LSTM(24,16,batch_first=True), attention=lambda: nn.MultiheadAttention(24,2,batch_first=True),
                            torch=lambda: nn.Linear(24,16), weight_norm=lambda: parametrizations.weight_norm(nn.Linear(24,16)))[how]()
            self.b = nn.Linear(24,16) if how=='attention' else nn.Identity()
        def forward(self, x):
            x = self.a(x.flatten(1)).relu()
            x = self.mid(x[:,None])[0][:,0] if how=='lstm' else self.mid(*[x[:,None]]*3)[0][:,0] if how=='attention' else self.mid(x)
            return self.out(self.b(x).relu())
    learn = Learner(image_dls('digits', bs=256), Net(), metrics=accuracy, opt_func=SGD)
    if how=='torch': prune.l1_unstructured(learn.model.mid, 'weight', .5)
    else: prune_model(learn.model, .5, layers=[learn.model.mid])
    def zeros(m): return float(torch.cat([(masks(m)[k]==0).flatten() for k in masks(m) if k.startswith('mid')]).float().mean())
    before = zeros(learn.model)
    quiet(learn, 1, 1e-2)
    small = learn.shrink()
    quiet(learn, 1, 1e-2)
    assert abs(before-.5)<.01 and zeros(small)==before
    assert max_difference(plain_copy(small), small, learn.dls)<1e-12


class Net2(nn.Module):
    "`f` of this network and its inputs; `mods` are its layers"
    def __init__(self, f, **mods):
        super().__init__()
        self.f = f
        for k,m in mods.items(): setattr(self, k, m)
    def forward(self, *xs): return self.f(self, *xs)

def C(i, o): return nn.Conv2d(i, o, 3, padding=1)
IMG = torch.randn(2,3,8,8, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('f', [
    lambda s,x: s.b(torch.stack([s.a(x),s.d(x)], 2).flatten(1, 2)), lambda s,x: s.c(torch.stack([s.a(x),s.d(x)], -1)[...,0]),
    lambda s,x: s.c(torch.cat([s.a(x),s.d(x)])[:2])+s.c(torch.cat([s.a(x),s.d(x)])[2:]), lambda s,x: s.c(torch.cat([s.a(x),s.d(x)], 3)[...,:5])])
def test_what_is_put_side_by_side_goes_together(f):
    m = Net2(f, a=C(3,12), d=C(3,12), b=C(24,2), c=C(12,2))
    groups = channel_groups(m, IMG)
    assert all({p.path for p in g.makers}>={'a','d'} for g in groups if g.name in ('a','d'))
    small = remove_channels(m, IMG, {'a': [0]}) if not groups['a'].stays else m
    assert small(IMG).shape==m(IMG).shape

@pytest.mark.parametrize('f', [lambda s,x: s.c(s.a(x).roll(1, 1)), lambda s,x: s.c(s.a(x).relu())+s.e(s.a(x)[:,[0,1]]),
                               lambda s,x: s.c(s.a(x))+s.a(x)[:,3:10].amax(1, keepdim=True), lambda s,x: s.c(s.n(s.a(x)))])
def test_channels_that_are_taken_by_position_stay(f):
    class First(nn.BatchNorm2d):
        def forward(self, x): y = super().forward(x); return torch.cat([y[:,:1]*2, y[:,1:]], 1)
    m = Net2(f, a=C(3,60), c=C(60,2), e=C(2,2), n=First(60)).eval()
    assert all(g.stays for g in channel_groups(m, IMG) if g.name=='a')

@pytest.mark.parametrize('f,where', [(lambda s,x: s.c(s.n(s.a(x))), ''), (lambda s,x: s.c(input=s.a(input=x)), ''), (lambda s,x: s.c(s.a(x)*x.new_empty(len(x),1,1,1).fill_(.5)), ''),
                                     (lambda s,x: s.c(s.k(s.a(x), 2)), 's.k')])
def test_what_leaves_channels_alone_is_known(f, where):
    class Two(nn.Conv2d):
        def forward(self, x, k): return super().forward(x)*k
    m = Net2(f, a=C(3,12), c=C(12,2), n=nn.Dropout2d(.2), **dict(k=Two(12,12,1)) if 's.k' in where else {}).eval()
    assert not channel_groups(m, IMG)['a'].stays
    check_shrunken(m, IMG, pickled=False)

def silent(m, n=4):
    "Channels of `a` whose weights are zero"
    with torch.no_grad(): m.a.weight[:n] = 0; m.a.bias[:n] = 0
    return m.eval()

@pytest.mark.parametrize('f,other', [
    (lambda s,x: s.b(s.a(x).masked_fill(x[:,:1]>50, -1.)), lambda x: x*100), (lambda s,x: s.b(torch.where(x[:,:1]<-50, s.t, s.a(x))), lambda x: x*100),
    (lambda s,x: s.b(F.relu(s.a(x)+x[:,:1]-2)), lambda x: x*5), (lambda s,x: s.b(s.a(x)+F.relu(x[:,:1]-20)), lambda x: x*100)])
def test_what_is_zero_for_this_batch_only_is_not_dead(f, other):
    m = silent(Net2(f, a=C(3,12), b=C(12,2), t=nn.Parameter(torch.ones(1,12,1,1))))
    x = IMG.clamp(-1, 1)
    small = shrink(m, x)
    assert max_difference(small, m, other(x))<1e-10

@pytest.mark.parametrize('f', [lambda s,x: s.b(F.relu(s.n(s.a(x)))), lambda s,x: s.b(F.leaky_relu(s.a(x)-1) if s.training else F.relu(s.a(x)-1))])
def test_what_is_zero_in_evaluation_only_is_not_dead(f):
    m = silent(Net2(f, a=C(3,12), b=C(12,2), n=nn.BatchNorm2d(12)))
    with torch.no_grad(): m.n.running_mean.fill_(3); m.n.bias.fill_(.5)
    small = shrink(m, IMG)
    a,b = (copy_network(o).double().train()(IMG.double()) for o in (m, small))
    assert torch.allclose(a, b)

@pytest.mark.parametrize('f', [lambda s,x: s.b(s.a(x)) if x.mean()<9 else s.d(s.a(x)), lambda s,x: s.b(s.a(x)) if len(x)>1 else s.d(s.a(x)), lambda s,x: s.b(s.a(x)) if len(x)<50 else s.d(s.a(x))])
def test_a_way_that_was_not_taken_is_not_cut_off(f):
    m = silent(Net2(f, a=C(3,12), b=C(12,2), d=C(12,2)))
    _silence(m, ChannelGroup('a', 12, [], [], [Part('b', torch.arange(12), torch.arange(12))]), torch.arange(12)<4)
    small = shrink(m, IMG)
    for x in (IMG, IMG[:1], IMG.repeat(30,1,1,1), IMG+20): assert small(x).shape==m(x).shape

def test_a_head_that_needs_targets_to_train():
    def f(s, x, y=None):
        if s.training:
            if y is None: raise ValueError('no targets')
            return s.b(s.a(x)),s.d(s.a(x))
        return s.b(s.a(x))
    m = silent(Net2(f, a=C(3,12), b=C(12,2), d=C(12,2)))
    small = shrink(m, IMG).train()
    assert len(small(IMG, IMG))==2

def test_code_that_reads_a_linear_layer_in_training():
    m = Net2(lambda s,x: (s.b(s.a(x)), s.b.weight.pow(2).sum()) if s.training else s.b(s.a(x)), a=nn.Linear(8,6), b=nn.Linear(6,3)).eval()
    with torch.no_grad(): m.a.weight[:,:3] = 0
    x = torch.randn(4,8)
    with torch.no_grad(): m.b.weight[:,1] = 0; m.a.weight[1] = 1
    assert len(shrink(m, x).train()(x))==2

def test_tensors_that_code_keeps_elsewhere_are_left_clean():
    kept = {}
    def f(s, x):
        h = s.a(x)
        if (h.shape,h.dtype) not in kept: kept[h.shape,h.dtype] = torch.ones_like(h)
        return s.b(h*kept[h.shape,h.dtype])
    big = Net2(f, a=C(3,12), b=C(12,2), e=C(3,40))
    channel_groups(big, IMG)
    assert not any(hasattr(t, '_labels') for t in kept.values()) and not any(hasattr(p, '_labels') for p in big.parameters())
    assert channel_groups(Net2(f, a=C(3,12), b=C(12,2)), IMG)['a'].n==12

@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_scripts_and_layers_with_a_forward_of_their_own_stay():
    m = nn.Sequential(C(3,12), nn.ReLU(), C(12,2)).eval()
    assert all(g.stays for g in channel_groups(torch.jit.script(m), IMG))
    with pytest.raises(ValueError, match='TorchScript module'): shrink(torch.jit.script(m), IMG)
    m[0].forward = (lambda f: lambda x: f(x)*2)(m[0].forward)
    y = m(IMG)
    assert channel_groups(m, IMG)['0'].stays and torch.equal(shrink(m, IMG)(IMG), y)

@dataclass(slots=True)
class Slots: y:torch.Tensor; h:torch.Tensor

def test_outputs_in_slots():
    m = Net2(lambda s,x: Slots(s.b(h := s.a(x)), h), a=C(3,12), b=C(12,2))
    assert channel_groups(m, IMG)['a'].stays==OUTPUT

@pytest.mark.parametrize('opt', ['adam','torch_sgd'])
def test_a_distillation_with_heads_goes_on_after_learn_shrink(opt):
    dls = image_dls('digits', bs=256)
    learn = Learner(dls, create('lenet5', dls), metrics=accuracy, opt_func=OPTS[opt])
    kd = KnowledgeDistillation(create('lenet5', dls).to(dls.device), KD()*.5+VID({'conv2': 'conv2'}))
    learn.add_cb(kd)
    quiet(learn, 1, 1e-3)
    prune_model(learn, .5, by='channel')
    learn.shrink()
    assert learn.model.conv2.out_channels==8
    quiet(learn, 1, 1e-3)
    assert kd.mean('vid')>0
    learn.remove_cb(kd)
    assert not any('distill' in n for n,_ in learn.model.named_modules())
    quiet(learn, 1, 1e-3)
