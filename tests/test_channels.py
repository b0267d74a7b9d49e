"Groups of channels, removing them, and shrinking: exact for every family of networks, and never wrong."
import itertools, pickle
from functools import partial

import pytest
import torchvision.models as tvm
from torch.nn.utils import parametrize
from fastai.vision.all import OptimWrapper, SGD, Adam, create_vision_model, resnet18, xresnet18, xresnet34
from common import quiet
from kdnb.all import *
from kdnb.channels import _removable, _silence, _some

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

# builder, number of groups that can go, paths of those that stay
FAMILIES = dict(
    vgg=(small_vgg, 9, ['fc.2']), mlp=(partial(mlp, hidden=40), 7, ['fc5']),
    lenet5=(partial(lenet5, in_shape=(3,32,32)), 4, ['fc3']),
    lenet5_caffe=(partial(lenet5_caffe, in_shape=(3,32,32)), 3, ['fc2']),
    resnet_a=(partial(cifar_resnet, depth=14, option='A'), 7, ['layer2.0.conv2','fc']), padded=(Padded, 2, ['b','out.2']),
    resnet_b=(partial(cifar_resnet, depth=14, option='B'), 9, ['fc']), wrn=(partial(create, 'wrn_16_1'), 9, ['fc']),
    preact_bottleneck=(partial(cifar_resnet, depth=20, kind='bottleneck'), None, None),
    resnet18=(tvm.resnet18, 12, ['fc']), resnet50=(tvm.resnet50, 37, ['fc']),
    resnext50=(tvm.resnext50_32x4d, 37, ['fc']),
    mobilenet_v2=(tvm.mobilenet_v2, 25, ['classifier.1']), mobilenet_v3=(tvm.mobilenet_v3_small, 27, ['classifier.3']),
    efficientnet=(tvm.efficientnet_b0, 40, ['classifier.1']), densenet=(tvm.densenet121, 120, ['classifier']),
    shufflenet=(tvm.shufflenet_v2_x0_5, 18, None), regnet=(tvm.regnet_y_400mf, 53, ['fc']),
    squeezenet=(tvm.squeezenet1_1, 25, ['classifier.1']), xresnet18=(partial(xresnet18, n_out=10), 14, ['11']),
    xresnet34=(partial(xresnet34, n_out=10), 22, ['11']),
    vision_learner=(lambda: create_vision_model(resnet18, 10, pretrained=False), 13, ['1.8']),
    vit=(vit, 2, ['conv_proj',*(f'encoder.layers.encoder_layer_{i}.mlp.3' for i in (0,1)),'heads.head']), unet=(lambda: UNet(nn.BatchNorm2d), 4, ['last.3']),
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
    return lively(FAMILIES[name][0]()).eval(),torch.randn(2, 3, *((64,64) if name=='squeezenet' else (32,32)))

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

@pytest.mark.parametrize('name', FAMILIES)
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

    large = n_params(m)>5e6
    for f in [choose] if large else [choose, all_but_one]:
        dead = {g: f(g) for g in free}
        muted = mute(deepcopy(m), free, dead)
        small = shrink(muted, x)
        assert max_difference(small, muted, x)<=1e-5
        assert widths(small, free)==expected(m, free, dead)
        assert not [k for k in small.stays if k not in [g.name for g in groups if g.stays]]
        if not large: assert n_params(shrink(small, x))==n_params(small)    # nothing is left to remove

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
    assert paths(g['conv1'].makers)==['conv1','layer1.0.conv2','layer1.1.conv2']
    assert paths(g['conv1'].norms)==['bn1','layer1.0.bn2','layer1.1.bn2']
    assert paths(g['conv1'].readers)==['layer1.0.conv1','layer1.1.conv1','layer2.0.conv1','layer2.0.shortcut.0']
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
    (Net(nn.GroupNorm(4,16)), 'GroupNorm between normalises over them'),
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
    def __init__(self):
        super().__init__()
        self.l,self.g,self.h,self.f = nn.Linear(32,24),nn.GRU(24,16,batch_first=True),nn.Linear(16,20),nn.Linear(20,10)
    def forward(self, x): return self.f(F.relu(self.h(self.g(F.relu(self.l(x[:,0])))[0][:,-1])))

def test_what_cannot_be_followed_stays_and_the_rest_goes():
    m,x = Recurrent(),torch.randn(2,3,32,32)
    with torch.no_grad():
        for t in (m.h.weight[:,3], m.h.weight[:5], m.h.bias[:5], m.l.weight[:4], m.l.bias[:4]): t.zero_()
    s = shrink(m, x)
    assert s.h[1].weight.shape==(15,15) and s.l.out_features==24 and list(s.stays)==['l']
    assert max_difference(s, m, x)<=1e-6

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
    with pytest.warns(UserWarning, match="16 of the 16 channels of 'conv1' were to go: 1 are kept"):
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
    assert s.training and not s.layer1[0].training and not s.layer1[0].bn1.training and s.layer1[1].bn1.training
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
