"Groups of channels, removing them, and shrinking: exact for every family of networks, and never wrong."
import pickle
from functools import partial

import pytest
import torchvision.models as tvm
from torch.nn.utils import parametrize
from fastai.vision.all import OptimWrapper, SGD, Adam, create_vision_model, resnet18, xresnet18, xresnet34
from kdnb.all import *
from kdnb.channels import _removable, _silence, _some

BN = nn.modules.batchnorm._BatchNorm

class Block(nn.Module):
    "A CIFAR residual block; `option` 'A' is a strided, padded shortcut, 'B' a convolution"
    def __init__(self, i, o, stride, option):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False),nn.BatchNorm2d(o)
        self.conv2,self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False),nn.BatchNorm2d(o)
        self.stride,self.more,self.option = stride,o-i,option
        if stride>1 and option=='B': self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride>1:
            x = self.shortcut(x) if self.option=='B' else F.pad(x[:,:,::2,::2], (0,0,0,0,self.more//2,self.more-self.more//2))
        return F.relu(x+y)

class PreBlock(nn.Module):
    "A block of a wide ResNet: norms come first"
    def __init__(self, i, o, stride):
        super().__init__()
        self.bn1,self.conv1 = nn.BatchNorm2d(i),nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn2,self.conv2 = nn.BatchNorm2d(o),nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(i, o, 1, stride, bias=False) if i!=o else None
    def forward(self, x):
        h = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + (x if self.shortcut is None else self.shortcut(h))

def head(n, c=10): return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, c)]
def cifar_resnet(option, w=(16,32,64)):
    return nn.Sequential(nn.Conv2d(3, w[0], 3, 1, 1, bias=False), nn.BatchNorm2d(w[0]), nn.ReLU(), Block(w[0], w[0], 1, option),
                         Block(w[0], w[1], 2, option), Block(w[1], w[2], 2, option), *head(w[2]))
def wrn():
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), PreBlock(16, 32, 1), PreBlock(32, 64, 2), PreBlock(64, 64, 1),
                         nn.BatchNorm2d(64), nn.ReLU(), *head(64))
def vgg(w=(16,16,32,32), h=40):
    layers,i = [],3
    for o in w:
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        i = o
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4*i, h), nn.ReLU(), nn.Linear(h, 10))
def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(.2), nn.Linear(40, 30),
                                nn.GELU(), nn.Linear(30, 10))

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
    def forward(self, x): return self.out(F.relu(self.d(F.relu(torch.cat([self.a(x), self.b(x)], 1)+self.c(x)))))

def vit(): return tvm.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10)

# builder, number of groups that can go, paths of those that stay
FAMILIES = dict(
    vgg=(vgg, 5, ['19']), mlp=(mlp, 2, ['7']), lenet5=(lambda: lenet5(in_shape=(3,32,32)), 4, ['fc3']),
    lenet5_caffe=(lambda: lenet5_caffe(in_shape=(3,32,32)), 3, ['fc2']),
    resnet_a=(lambda: cifar_resnet('A'), 3, ['0','8']), resnet_b=(lambda: cifar_resnet('B'), 6, ['8']), wrn=(wrn, 6, ['8']),
    resnet18=(tvm.resnet18, 12, ['fc']), resnet50=(tvm.resnet50, 37, ['fc']), resnext50=(tvm.resnext50_32x4d, 37, ['fc']),
    mobilenet_v2=(tvm.mobilenet_v2, 25, ['classifier.1']), mobilenet_v3=(tvm.mobilenet_v3_small, 27, ['classifier.3']),
    efficientnet=(tvm.efficientnet_b0, 40, ['classifier.1']), densenet=(tvm.densenet121, 120, ['classifier']),
    shufflenet=(tvm.shufflenet_v2_x0_5, None, None), regnet=(tvm.regnet_y_400mf, 53, ['fc']), squeezenet=(tvm.squeezenet1_1, 25, ['classifier.1']),
    xresnet18=(partial(xresnet18, n_out=10), 14, ['11']), xresnet34=(partial(xresnet34, n_out=10), 22, ['11']),
    vision_learner=(lambda: create_vision_model(resnet18, 10, pretrained=False), 13, ['1.8']), vit=(vit, 2, ['conv_proj','heads.head']),
    unet=(lambda: UNet(nn.BatchNorm2d), 4, ['last.3']), unet_in=(lambda: UNet(partial(nn.InstanceNorm2d, affine=True)), 4, ['last.3']),
    cat_add=(CatAdd, 2, ['out.2']))

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
    for g in groups: _silence(m, g.makers+g.norms, dead[g])
    return m

def widths(m, groups): return {(g.name, p.path): len(m.get_submodule(p.path).weight) for g in groups for p in g.makers
                               if not getattr(m.get_submodule(p.path), 'transposed', False)}

def expected(m, groups, dead):
    "Outputs of every layer when the channels `dead` are gone"
    gone = {}
    for g in groups:
        for p in g.makers: gone[p.path] = gone.get(p.path, 0) + int(dead[g][p.unit].sum())
    return {(g.name, p.path): len(m.get_submodule(p.path).weight)-gone[p.path] for g in groups for p in g.makers
            if not getattr(m.get_submodule(p.path), 'transposed', False)}

@pytest.mark.parametrize('name', FAMILIES)
def test_families(name):
    m,x = build(name)
    groups = channel_groups(m, x)
    free,(n,stay) = [g for g in groups if not g.stays],FAMILIES[name][1:]
    if n: assert (len(free), [g.name for g in groups if g.stays])==(n, stay)
    dead = {g: choose(g) for g in free}

    unread = deepcopy(m)
    for g in free: _silence(unread, g.readers, dead[g], reads=True)
    asked = {}
    for g,p in ((g,p) for g in free for p in g.makers): asked.setdefault(p.path, []).extend(p.at[dead[g][p.unit]].tolist())
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

@pytest.mark.parametrize('small,large', [(vgg((9,12,20,24), 31), vgg()), (cifar_resnet('B', (12,20,48)), cifar_resnet('B'))])
def test_parameters_and_macs_are_those_of_a_network_built_that_size(small, large):
    x,shapes = torch.randn(2,3,32,32),[p.shape for p in small.parameters()]
    n = {k: len(p) for k,p in small.state_dict().items() if k.endswith('weight')}
    groups = [g for g in channel_groups(lively(large), x) if not g.stays]
    mute(large, groups, {g: torch.randperm(g.n)>=n[f'{g.name}.weight'] for g in groups})
    s = shrink(large, x)
    assert [p.shape for p in s.parameters()]==shapes
    assert macs(s, x)['']==macs(small, x)[''] and n_params(s)==n_params(small)
    small.load_state_dict(s.state_dict())
    assert max_difference(small, large, x)<=1e-5

def test_members_of_groups():
    m,x = build('resnet_b')
    g = {g.name: g for g in channel_groups(m, x)}
    paths = lambda ps: [p.path for p in ps]
    assert paths(g['0'].makers)==['0','3.conv2'] and paths(g['0'].norms)==['1','3.bn2']
    assert paths(g['0'].readers)==['3.conv1','4.conv1','4.shortcut.0']
    assert paths(g['4.conv1'].readers)==['4.conv2'] and g['4.conv1'].n==32
    m,x = build('vgg')
    g = channel_groups(m, x)['12']
    assert (g.readers[0].at==torch.arange(128)).all() and (g.readers[0].unit==torch.arange(128)//4).all()
    m,x = build('unet')
    g = {g.name: g for g in channel_groups(m, x)}
    assert g['up'].readers[0].at.tolist()==[*range(8)] and g['down.0'].readers[-1].at.tolist()==[*range(8,16)]
    assert 'up: 8 channels' in repr(g['up']) and 'up' in repr(channel_groups(m, x))

def test_grouped_convolutions_lose_as_many_channels_in_each_block():
    conv = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4), nn.ReLU(), *head(8)).eval()
    x = torch.randn(2,3,9,9)
    g = channel_groups(conv, x)['0']
    assert g.blocks.tolist()==[0,0,0,1,1,1,2,2,2,3,3,3]
    with pytest.raises(ValueError, match='the same number from each of its 4 blocks; asked for 0 to 2'):
        remove_channels(conv, x, {'0': [0,1,3,6]})
    assert remove_channels(conv, x, {'0': [0,4,6,11]})[2].weight.shape==(8,2,3,3)
    m = deepcopy(conv)
    _silence(m, g.makers, torch.tensor([1,1,0,1,0,0,0,0,1,0,1,1]).bool())
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

@pytest.mark.parametrize('model,why', [
    (Net(nn.GroupNorm(4,16)), 'GroupNorm between normalises over them'), (Net(nn.Softmax(1)), 'cannot be followed exactly'),
    (Net(nn.ReLU(), lambda y,a: (y,a)), "they are the network's output"), (Net(nn.Identity(), lambda y,a: dict(y=y, a=a)), "the network's output"),
    (Net(nn.LayerNorm(30)), 'LayerNorm between normalises over them'), (Net(nn.ChannelShuffle(4)), 'counts on their number')])
def test_what_stays(model, why):
    x = torch.randn(2,3,32,32)
    g = channel_groups(model, x)['a']
    assert why in g.stays, g.stays
    _silence(model, g.makers, torch.arange(16)<4)
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
    with torch.no_grad(): m.h.weight[:,3] = 0; m.h.weight[:5] = 0; m.h.bias[:5] = 0; m.l.weight[:4] = 0; m.l.bias[:4] = 0
    s = shrink(m, x)
    assert s.h[1].weight.shape==(15,15) and s.l.out_features==24 and list(s.stays)==['l'] and max_difference(s, m, x)<=1e-6

class Untraced(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(8,6),nn.Linear(6,4)
    def forward(self, x): return self.b(self.a(x)).argmax(1)      # no gradient: nothing to follow

def test_a_network_without_gradient():
    m,x = Untraced(),torch.randn(5,8)
    with torch.no_grad(): m.a.weight[:,:3] = 0; m.b.weight[:,2] = 0
    groups = channel_groups(m, x)
    assert [g.name for g in groups]==['a','b'] and all('cannot be followed' in g.stays for g in groups)
    assert shrink(m, x).a[1].in_features==5

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

def test_remove_channels_refuses():
    m,x = build('resnet_b')
    with pytest.raises(ValueError, match="no convolution or linear layer '1' runs"): remove_channels(m, x, {'1': [0]})
    with pytest.raises(ValueError, match="'0' has 16 output channels, 0 to 15; asked to remove 3 to 16"): remove_channels(m, x, {'0': [3,16]})
    with pytest.raises(ValueError, match='0 to 15; asked to remove -1'): remove_channels(m, x, {'0': [-1]})
    with pytest.raises(ValueError, match="'8' cannot be removed exactly: they are the network's output"): remove_channels(m, x, {'8': [1]})
    with pytest.warns(UserWarning, match="all 16 channels of '0' were to go: 1 kept"): s = remove_channels(m, x, {'0': range(16)})
    assert s[0].out_channels==1 and s[3].conv2.out_channels==1 and m[0].out_channels==16
    assert s(x).shape==(2,10) and remove_channels(m, x, {})[0].out_channels==16
    s = remove_channels(m, x, {'0': torch.tensor([0,2]), '3.conv2': [1]})      # two names of one group
    assert s[0].out_channels==13

class Mask(nn.Module):
    def __init__(self, mask): super().__init__(); self.register_buffer('mask', mask)
    def forward(self, w): return w*self.mask

def attach(m, groups, dead):
    "Masks on makers, norms and readers, as parametrizations"
    clean = deepcopy(m)
    with torch.no_grad():
        for p in clean.parameters(): p.fill_(1.)
    mute(clean, groups, dead)
    for g in groups: _silence(clean, g.readers, dead[g], reads=True)
    for path,o in list(m.named_modules()):
        for n,p in list(o._parameters.items()):
            mask = dict(clean.named_parameters())[f'{path}.{n}'.lstrip('.')] if p is not None else torch.ones(1)
            if (mask==0).any(): parametrize.register_parametrization(o, n, Mask(mask.detach().clone()))
    return m

def masked(name='resnet_b'):
    m,x = build(name)
    groups = [g for g in channel_groups(m, x) if not g.stays]
    return attach(m, groups, {g: choose(g) for g in groups}),x,groups

def state(m): return {k: v.clone() for k,v in m.state_dict().items()},[o.training for o in m.modules()],[p.requires_grad for p in m.parameters()]

def same(a, b): return a[1:]==b[1:] and a[0].keys()==b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])

def test_masks_are_folded_and_the_original_is_untouched():
    m,x,groups = masked()
    m.train(); m[3].eval(); m(x).sum().backward()
    grads,before,rng = [p.grad.clone() for p in m.parameters()],state(m),torch.get_rng_state()
    y = deepcopy(m).eval()(x)
    assert widths(m, groups).keys()==widths(m, [g for g in channel_groups(m, x) if not g.stays]).keys()
    s = shrink(m, x)
    assert same(state(m), before) and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p.grad, g) for p,g in zip(m.parameters(), grads))
    assert not any(parametrize.is_parametrized(o) for o in s.modules()) and all(p.grad is None for p in s.parameters())
    assert s.training and not s[3].training and not s[3].bn1.training and s[4].bn1.training
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
    assert not any(p.requires_grad for p in s.parameters()) and not s.training and s[0].out_channels<16

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
    m = Net(nn.ReLU(), lambda y,a: y+torch.rand_like(y))
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
    assert s[1].num_batches_tracked==2 and m[1].num_batches_tracked==0 and s[1].momentum==.1 and s.training and not s[3].training
    assert (s[1].running_mean-m[1].running_mean).abs().max()>.01
    n = shrink(m, dls, update_bn=True)[1].num_batches_tracked
    assert n==len(dls.train) and shrink(m, dls, update_bn=dls.valid)[1].num_batches_tracked==len(dls.valid)
    with pytest.raises(ValueError, match='counts training batches'): shrink(m, dls.one_batch()[0], update_bn=3)


OPTS = dict(sgd=partial(SGD, mom=.9, wd=1e-2), adam=Adam, torch_sgd=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9),
            torch_adam=partial(OptimWrapper, opt=torch.optim.AdamW))

def masked_learner(opt_func):
    set_seed(0)
    dls = image_dls(bs=64)
    m = nn.Sequential(nn.Conv2d(1,12,3,padding=1,bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12,16,3), nn.ReLU(), nn.Flatten(),
                      nn.Linear(16*36,30), nn.ReLU(), nn.Linear(30,10))
    x = dls.one_batch()[0]
    with torch.no_grad(): m[6].weight[:,5::36] = 0
    groups = [g for g in channel_groups(m, x) if not g.stays]
    attach(m, groups, {g: choose(g) for g in groups})
    def splitter(m): return L(L(m[:4].parameters()), L(m[4:].parameters()))
    return Learner(dls, m, opt_func=opt_func, splitter=splitter, lr=1e-2)

@pytest.mark.parametrize('opt', OPTS)
def test_training_goes_on_in_the_shrunken_network(opt):
    learn = masked_learner(OPTS[opt])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, slice(1e-3,1e-2))
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
        for k,v in s.state_dict().items(): assert ref[k].shape==v.shape and torch.allclose(ref[k].float(), v.float(), atol=1e-6), k
    with learn.no_bar(), learn.no_logging(): learn.fit(1); learn.validate()

def test_shrinking_a_learner_that_has_not_trained():
    learn = masked_learner(SGD)
    s = learn.shrink(update_bn=3)
    assert learn.opt is None and learn.model is s and s[1].num_batches_tracked==3
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

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
