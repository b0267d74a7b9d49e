"Variational layers against slow sums in double precision, conversion and removal on every family of networks, every kind of training, and what is refused."
import itertools, sys, warnings, zipfile
from types import SimpleNamespace

import pytest
import torch.distributed as tdist
from scipy.special import digamma
from scipy.stats import poisson
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import MobileNetV2
import two_processes as ddp
from common import CPUAutocast, data, flat, quiet, same, seeded, state, still
from kdnb.all import *

def lenet(hidden=(12,7)): set_seed(1); return create('lenet300', in_shape=(1,8,8), hidden=hidden).eval()
def learner(model=None, dls=None, cbs=None, **kwargs): return seeded(dls or data(), to_variational(lenet()) if model is None else model, cbs=cbs, **kwargs)

@torch.no_grad()
def spread(v, p=.5, seed=0):
    "Random γ and log-variances: about the fraction `p` of each gate is noise (log α over 1.5), never its first group; random weights' variances"
    rng = torch.Generator().manual_seed(seed)
    def rand(like, low, high): return torch.rand(like.shape, generator=rng)*(high-low) + low
    for m in noise_groups(v).values():
        if isinstance(m, Gate):
            dead = (rand(m.gamma, 0, 1)<p) & (torch.arange(m.n)>0)
            m.gamma.copy_(rand(m.gamma, .4, 1.3)*torch.where(rand(m.gamma, 0, 1)<.3, -1, 1))
            m.gamma_logvar.copy_(torch.where(dead, rand(m.gamma, 2, 4), rand(m.gamma, -9, -5)))
        else: m.weight_logvar.copy_(m.weight.square().log() + torch.where(rand(m.weight, 0, 1)<p, rand(m.weight, 4, 6), rand(m.weight, -6, -3)))
    for m in variational_layers(v).values():
        if isinstance(m, GroupLayer) and m.weight_logvar is not None: m.weight_logvar.copy_(rand(m.weight, -9, -5))
    return v

def places(gates, values):
    "The factor at each place of an axis, place by place; `values` is `{gate: numbers of its groups}`"
    if isinstance(gates, Gate): return values[gates].tolist()
    res = [1.]*gates.n
    for i,g in enumerate(gates.gates):
        for at,unit in zip(*getattr(gates, f'places{i}').tolist()): res[at] *= values[g][unit].item()
    return res

def randomise(m, seed=0):
    "BatchNorm statistics and scales that are not trivial"
    set_seed(seed)
    for o in m.modules():
        if isinstance(o, nn.modules.batchnorm._BatchNorm):
            for t,low,high in ((o.running_mean,-.3,.3), (o.running_var,.5,1.5), (o.weight.data,.5,1.5), (o.bias.data,-.3,.3)): t.uniform_(low, high)
    return m.eval()


# the price of noise

def test_printed_values_of_the_kl():
    for dtype in (torch.float32, torch.double):
        assert torch.allclose(group_kl(torch.tensor([-9.,0,3], dtype=dtype)), torch.tensor([5.13581532,.43123895,.02542004], dtype=dtype), atol=1e-6)
    assert abs(group_kl(torch.zeros(()), exact=True).item()-.42668560)<1e-7

def test_group_kl_values_and_gradient():
    la = torch.tensor([-9.,-4.6,-4.5,0,3,12], dtype=torch.double, requires_grad=True)
    for exact in (False, True): assert torch.autograd.gradcheck(lambda o: group_kl(o, exact), la)
    for a,kl in zip(la.tolist(), group_kl(la, True).tolist()):
        lam = .5*math.exp(-a); j = np.arange(max(0, int(lam-40*lam**.5)), int(lam+40*lam**.5+60))
        assert abs(kl - .5*((poisson.pmf(j, lam)*digamma(j+.5)).sum()-digamma(.5))) < 1e-9
    sig = lambda t: 1/(1+math.exp(-t))
    ref = [.63576 - .63576*sig(1.87320+1.48695*a) + .5*math.log(1+math.exp(-a)) for a in la.tolist()]
    assert torch.allclose(group_kl(la), torch.tensor(ref, dtype=torch.double), rtol=1e-9)

def test_kl_at_the_ends():
    "Finite, positive and falling, however certain or noisy"
    la = torch.tensor([-200.,-60,-20,20,60,200])
    for exact in (False, True):
        k = group_kl(la, exact)
        assert k.isfinite().all() and (k>=0).all() and (k.diff()<=0).all()
    for mu,lv in itertools.product((0.,1e-20,1e10), (-200.,0.,80.)):
        m,s = torch.tensor([mu], requires_grad=True),torch.tensor([lv], requires_grad=True)
        GroupKL.apply(m, s).backward()
        assert m.grad.isfinite().all() and s.grad.isfinite().all() and s.grad<=0

def test_kl_keeps_dtype_and_shape():
    for dt in (torch.float32, torch.bfloat16): assert group_kl(torch.zeros(2,3, dtype=dt), exact=True).dtype==dt
    assert group_kl(torch.zeros(2,3)).shape==(2,3)

def test_written_out_gradients():
    ps = [torch.randn(3,2, dtype=torch.double, requires_grad=True),torch.zeros(4, dtype=torch.double, requires_grad=True)]
    assert torch.autograd.gradcheck(HalfSquare.apply, ps)
    mu,logvar = (torch.randn(6, dtype=torch.double) for _ in range(2))
    for m in (mu, mu*1e-3):      # a live and a dying group
        m.requires_grad_(); logvar.requires_grad_()
        ref = torch.autograd.grad(group_kl(log_alpha(m, logvar)).sum(), (m, logvar))
        assert all(map(torch.allclose, torch.autograd.grad(GroupKL.apply(m, logvar), (m, logvar)), ref))

class Fork(nn.Module):
    "A residual network: one gate on the inputs of three layers, `Gates` behind a concatenation and behind a flattened map"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.d = (nn.Conv2d(i, o, 3, padding=1) for i,o in ((1,4), (4,4), (4,3), (7,5)))
        self.out = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20,10))
    def forward(self, x):
        x = self.a(x).relu()
        x = (x + self.b(x)).relu()
        return self.out(self.d(torch.cat([self.c(x).relu(), x], 1)).relu())

XF = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
def fork(noise='group', **kwargs): set_seed(0); return spread(to_variational(Fork().eval(), XF, 'channels', noise), **kwargs)

@pytest.mark.parametrize('noise', ['group','full'])
def test_kl_of_a_network(noise):
    "A gate that several layers share is paid for once; weights without a variance pay ½θ²"
    v,seen,groups,theta = fork(noise),set(),0.,0.
    for p,m in v.named_modules():
        if isinstance(m, Gate) and m not in seen:
            seen.add(m)
            for mu,lv in zip(m.gamma.tolist(), m.gamma_logvar.tolist()):
                a = lv-math.log(mu**2+1e-8)
                groups += .63576/(1+math.exp(1.8732+1.48695*a)) + .5*math.log1p(math.exp(-a))
        if isinstance(m, (nn.Conv2d,nn.Linear)) and isinstance(m, GroupLayer):
            for t,lv in ((m.weight,m.weight_logvar), (m.bias,m.bias_logvar)):
                t = t.double()
                if noise=='full': theta += kl_divergence(Normal(t, (lv.double()/2).exp()), Normal(0., 1.)).sum().item()
                else: theta += .5*t.square().sum().item()
    got = [o.item() for o in kl(v)]
    assert abs(got[0]-groups)<1e-5*groups and abs(got[1]-theta)<1e-5*theta
    loss = sum(kl(v))
    grads = torch.autograd.grad(loss, list(noise_groups(v).values())[0].gamma, retain_graph=True)[0]
    g = list(noise_groups(v).values())[0]
    ref = torch.autograd.grad(group_kl(log_alpha(g.gamma.double(), g.gamma_logvar.double())).sum(), g.gamma)[0]
    assert torch.allclose(grads, ref, rtol=1e-4, atol=1e-7)

@pytest.mark.parametrize('noise', ['group','full'])
@pytest.mark.parametrize('bias', [True, False])
def test_kl_of_a_layer(noise, bias):
    lin,ref = random_layer('linear', noise, 'inputs', bias),0.
    for n in ('weight','bias'):
        p,lv = getattr(lin, n),getattr(lin, f'{n}_logvar')
        if p is None: continue
        for i,m in enumerate(p.flatten().tolist()):
            v = 1. if lv is None else math.exp(lv.flatten()[i].item())
            ref += .5*(v+m*m-math.log(v)-1)
    assert abs(kl(lin)[1].item()-ref) < 1e-6*ref

def test_kl_of_single_weights():
    v = spread(to_variational(lenet(), groups='weights'))
    ref = sum(group_kl(log_alpha(m.weight.double(), m.weight_logvar.double())).sum().item() for m in variational_layers(v).values())
    groups,theta = kl(v)
    assert abs(groups.item()-ref)<1e-5*ref and theta==0


# layers

def random_layer(kind, noise, axis, bias=True):
    "In double precision, with random parameters; `axis` is inputs, outputs or both; `noise` is group, full or single"
    set_seed(3)
    if kind=='linear': m = nn.Linear(5, 4, bias)
    elif kind=='conv': m = nn.Conv2d(2, 3, 3, 2, 1, bias=bias)
    else: m = nn.Conv2d(4, 6, 3, groups=2, bias=bias)
    n_in,n_out = m.weight.shape[1],m.weight.shape[0]
    m.__class__ = {('linear','single'): VDLinear, ('conv','single'): VDConv2d, ('grouped','single'): VDConv2d}.get((kind,noise), GroupLinear if kind=='linear' else GroupConv2d)
    if noise=='single': m._add_noise()
    else: m._add_noise(noise, **{k: Gate(n) for k,n in (('inputs',n_in),('outputs',n_out)) if axis in (k,'both')})
    m.double()
    with torch.no_grad():
        for n,p in m.named_parameters(): p.copy_(torch.randn_like(p)-2*n.endswith('logvar'))
    return m

def patches(m, x):
    "What each output of a layer reads of one example: `(output, place, {input group: {place in the weight: value}})`"
    if isinstance(m, nn.Linear): x,size,at = x[:,None,None],(1,1),[(0,0)]
    else:
        x = F.pad(x, (m.padding[1],)*2+(m.padding[0],)*2)
        size = m.kernel_size
        at = [(i,j) for i in range(0, x.shape[1]-size[0]+1, m.stride[0]) for j in range(0, x.shape[2]-size[1]+1, m.stride[1])]
    n,blocks = m.weight.shape[1],getattr(m, 'groups', 1)
    for o in range(len(m.weight)):
        first = o//(len(m.weight)//blocks)*n
        for p,(i,j) in enumerate(at): yield o,p,x[first:first+n,i:i+size[0],j:j+size[1]].reshape(n, -1)

@torch.no_grad()
def moments(m, x):
    "Mean and covariance of the outputs of layer `m` for one example, in double precision, from groups, weights and places one by one"
    def gate(g, n): return (torch.ones(n).double(),torch.zeros(n).double()) if g is None else (g.gamma,g.gamma_logvar.exp())
    w = m.weight.flatten(2) if m.weight.ndim>2 else m.weight[...,None]
    sw = torch.zeros_like(w) if m.weight_logvar is None else m.weight_logvar.exp().view_as(w)
    b,sb = ([0.]*len(w) if o is None else f(o).tolist() for o,f in ((m.bias,lambda o: o), (getattr(m, 'bias_logvar', None),torch.exp)))
    (ai,vi),(ao,vo) = gate(getattr(m, 'inputs', None), w.shape[1]),gate(getattr(m, 'outputs', None), len(w))
    rows = []
    for o,p,u in patches(m, x):
        parts = (w[o]*u).sum(1)                                          # what each input group brings
        own = sum((ai[i]**2+vi[i])*(sw[o,i]*u[i]**2).sum() for i in range(len(u))) + sb[o]
        rows.append((o, parts, (ai*parts).sum()+b[o], own))
    mean,cov = torch.stack([ao[o]*z for o,_,z,_ in rows]),torch.zeros(len(rows), len(rows)).double()
    for r,(o,a,z,own) in enumerate(rows):
        for s,(q,c,y,_) in enumerate(rows):
            both = ao[o]*ao[q] + vo[o]*(o==q)                            # E γ_o γ_q
            cov[r,s] = both*((vi*a*c).sum() + z*y + own*(r==s)) - mean[r]*mean[s]
    return mean,cov

LAYERS = [(k,n,a,b) for k in ('linear','conv') for n in ('group','full') for a in ('inputs','outputs','both') for b in (True,False)] + [
    ('grouped','group','outputs',True), ('grouped','full','outputs',True), ('linear','single',None,True), ('conv','single',None,False), ('grouped','single',None,True)]
each_layer = pytest.mark.parametrize('kind,noise,axis,bias', LAYERS)

def example(kind): return torch.randn(*dict(linear=(5,), conv=(2,4,4), grouped=(4,4,4))[kind], generator=torch.Generator().manual_seed(1)).double()

@each_layer
def test_mean_and_covariance_of_the_output(kind, noise, axis, bias):
    "Group noise is one draw for a batch, all other noise one for each example"
    m,x = random_layer(kind, noise, axis, bias),example(kind)
    mean,cov = moments(m, x)
    assert torch.allclose(m.eval()(x[None]).flatten(), mean)
    m.train()
    n = 3000 if noise=='group' else 40_000
    with torch.no_grad():
        if noise=='group': outs = torch.stack([m(x[None]).flatten() for _ in range(n)])
        else: outs = m(x.expand(n, *x.shape)).flatten(1)
        if noise=='group': assert torch.allclose(*m(torch.stack([x,x])), rtol=0, atol=1e-12)     # a row may be added up in another order
    sd = cov.diag().sqrt()
    assert ((outs.mean(0)-mean).abs() < 5*sd/n**.5 + 1e-9).all()
    assert ((outs.T.cov()-cov).abs() < 12*sd[:,None]*sd/n**.5 + 1e-9).all()
    if noise!='group': assert abs(torch.corrcoef(torch.stack([outs[:-1,0],outs[1:,0]]))[0,1]) < 5/n**.5    # examples are independent

@each_layer
def test_gradients_through_the_noise(kind, noise, axis, bias):
    m,x = random_layer(kind, noise, axis, bias).train(),torch.stack([example(kind)]*2).requires_grad_()
    names,ps = zip(*m.named_parameters())
    def f(x, *ps): torch.manual_seed(0); return functional_call(m, dict(zip(names, ps)), x)
    assert torch.autograd.gradcheck(f, (x, *ps), eps=1e-3, atol=2e-3, rtol=2e-3, fast_mode=True)      # the square root is taken in single precision

@pytest.mark.parametrize('noise', ['group','full'])
def test_more_axes(noise):
    "A linear layer acts on the last axis; each example has its draw"
    m = random_layer('linear', noise, 'both').float().train()
    out = m(torch.ones(3,2,5))
    assert out.shape==(3,2,4) and torch.allclose(out[0], out[1], atol=1e-6)==(noise=='group')
    assert torch.allclose(still(m)(torch.ones(3,2,5)), F.linear(torch.ones(5)*m.inputs.gamma, m.weight, m.bias).expand(3,2,4)*m.outputs.gamma, atol=1e-5)

def test_padding_modes_and_dilation():
    for kw in (dict(padding=1, padding_mode='reflect'), dict(padding=2, dilation=2), dict(padding='same')):
        conv = nn.Conv2d(2, 3, 3, **kw)
        v,x = still(to_variational(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(3, 1, 1)), groups='inputs', noise='full')),torch.randn(2,2,6,6)
        assert torch.allclose(v.train()(x), nn.Sequential(conv, nn.ReLU(), v[2].eval())(x), atol=1e-5)

def test_arguments_of_layers():
    for f in (lambda: GroupLinear(2, 2, noise='some'), lambda: GroupConv2d(2, 2, 3, noise='none')):
        with pytest.raises(ValueError, match="expected 'group' or 'full'"): f()
    with pytest.raises(ValueError, match='convolution in 2 groups has no gate on its inputs'): GroupConv2d(4, 4, 3, groups=2, axis='inputs')
    m = GroupConv2d(2, 6, 3, stride=2, padding=1, bias=False, noise='full', axis='inputs')
    assert m.inputs.n==2 and m.outputs is None and m.bias_logvar is None and m(torch.randn(1,2,8,8)).shape==(1,6,4,4)
    m = GroupConv2d(2, 6, 3)
    assert m.outputs.n==6 and m.inputs is None and m.weight_logvar is None
    assert (m.outputs.log_alpha+9).abs().max()<1e-5 and (m.outputs.gamma==1).all()


# one gate, many layers

def draws_of(monkeypatch):
    "A list that every draw from now on is noted in, as `(gate, draw)`"
    seen,draw = [],Gate.draw
    def noted(self, layer, *bs): seen.append((self, (v := draw(self, layer, *bs)).detach().clone())); return v
    monkeypatch.setattr(Gate, 'draw', noted)
    return seen

def check_pass(seen, run, n_gates):
    "In each of three passes every gate has one value, and another one in the next"
    last = {}
    for _ in range(3):
        seen.clear(); run()
        now = {}
        for g,v in seen: assert torch.equal(now.setdefault(g, v), v)
        assert len(now)==n_gates and len(seen)>n_gates
        assert not any(g in last and torch.equal(last[g], v) for g,v in now.items())
        last = now

@pytest.mark.parametrize('noise', ['group','full'])
def test_layers_of_one_gate_see_one_draw(noise, monkeypatch):
    v,seen = fork(noise).train(),draws_of(monkeypatch)
    shared = [m for m in variational_layers(v).values() if m.inputs is v.b.inputs]
    assert shared==[v.b, v.c] and v.b.inputs in v.d.inputs.gates
    check_pass(seen, lambda: v(XF), 4)
    check_pass(seen, lambda: v(XF[:3]), 4)         # another batch size
    for copy in (deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        o = copy(v)
        assert o.b.inputs is o.c.inputs is not v.b.inputs
        check_pass(seen, lambda: v(XF), 4)
        before = {d.shape: d for _,d in seen}
        o = copy(v)
        seen.clear(); o(XF)
        assert not any(torch.equal(before[d.shape], d) for _,d in seen)      # a copy does not repeat the last draw
        check_pass(seen, lambda: o(XF), 4)
    with torch.no_grad(): v.eval()(XF); v.train()
    check_pass(seen, lambda: v(XF), 4)

def test_one_draw_after_half_a_pass(monkeypatch):
    v,seen = fork().train(),draws_of(monkeypatch)
    v(XF)
    v.c(torch.randn(2,4,8,8))                # a part of the network has run
    check_pass(seen, lambda: v(XF), 4)

def test_one_draw_in_ddp(monkeypatch, tmp_path):
    tdist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        v,seen = fork().train(),draws_of(monkeypatch)
        m = DistributedDataParallel(v)
        check_pass(seen, lambda: m(XF).sum().backward(), 4)
    finally: tdist.destroy_process_group()

def test_compiled():
    v,graphs = fork(),[]
    c = torch.compile(v, backend=lambda gm,_: graphs.append(gm) or gm.forward, fullgraph=True)
    with torch.no_grad(): assert torch.allclose(c(XF), v(XF), atol=1e-6)
    v.train()
    outs = [c(XF).detach() for _ in range(3)]
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])
    c(XF).sum().backward()
    assert all(p.grad.isfinite().all() for p in v.parameters() if p.grad is not None) and v.b.inputs.gamma_logvar.grad.count_nonzero()
    set_seed(0); a = still(v)(XF)
    assert torch.allclose(a, c(XF), atol=1e-5)
    assert len(graphs)<=3      # evaluation, the first pass with noise, all passes after it

def test_gates_place_by_place():
    set_seed(0)
    a,b,c = Gate(3),Gate(2),Gate(6)
    gates = Gates(6, [(a, torch.tensor([5,0,2]), torch.tensor([0,1,1])), (b, torch.tensor([1,3,4]), torch.tensor([1,1,0])), (c, torch.arange(6), torch.randperm(6))])
    values = {g: torch.randn(g.n) for g in (a,b,c)}
    assert torch.allclose(gates.of(values.get), torch.tensor(places(gates, values)))
    many = {g: torch.randn(4, g.n) for g in (a,b,c)}
    assert torch.allclose(gates.of(many.get), torch.stack([torch.tensor(places(gates, {g: v[i] for g,v in many.items()})) for i in range(4)]))
    assert set(gates.state_dict())>={'places0','places1','places2','gates.0.gamma'}


# conversion

NETS = dict(lenet300=dict(in_shape=(1,8,8)), lenet5=dict(in_shape=(1,16,16)), lenet5_caffe=dict(in_shape=(1,16,16)), vgg11=dict(width=.25), resnet14={}, wrn_10_1={},
            resnet18=dict(width=.25), mobilenet_v2={}, partly=dict(option='A'))
def net(name):
    set_seed(0)
    if name=='mobilenet_v2': m = MobileNetV2(10, .5, [[1,16,1,1],[6,24,2,2],[6,32,1,2]])
    else: m = create(dict(partly='resnet8').get(name, name), **NETS[name])
    m = randomise(m)
    return m,torch.randn(3, *NETS[name].get('in_shape', (3,32,32)))

def readers(v, gate): return [p for p,m in variational_layers(v).items() if getattr(m, 'inputs', None) is gate]

deep = 'resnet14','wrn_10_1','resnet18'      # what shares channels matters where channels are grouped; else a small residual network will do
@pytest.mark.parametrize('name,groups', [(n,g) for n in NETS for g in ('neurons','channels','inputs','weights') if g=='channels' or n not in deep])
def test_masked_is_shrunken(name, groups):
    m,x = net(name)
    before = state(m)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        v = to_variational(m, x, groups)
    assert any('no gates for the channels of' in str(o.message) for o in said)==(name=='partly' and groups=='channels')
    assert torch.equal(v.eval()(x), m(x)) and getattr(v, 'arch', None)==getattr(m, 'arch', None) and same(state(m), before)
    spread(v, .4)
    masks,d = kept(v),to_deterministic(v)
    assert all(0<o.sum()<o.numel() for o in masks.values() if o.numel()>3)
    assert not any('kdnb.variational' in type(o).__module__ for o in d.modules()) and set(d.state_dict())==set(before)
    values = {g: g.gamma*masks[n] for n,g in noise_groups(v).items() if isinstance(g, Gate)}
    for p,l in variational_layers(v).items():          # θ·diag(m∘μ), place by place
        w = d.get_submodule(p).weight
        if groups=='weights': assert torch.equal(w, l.weight*masks[p])
        else: assert torch.allclose(w, l.weight*torch.tensor(places(l.inputs, values)).view(1, -1, *[1]*(w.ndim-2)), atol=1e-7)
    s = shrink(d, x).eval()
    with torch.no_grad(): a,b = d.eval()(x),s(x)
    assert (a-b).abs().max() <= 1e-5*max(1, a.abs().max().item())
    if groups!='weights': assert n_weights(s)<n_weights(d)
    if groups in ('channels','neurons') or name in ('lenet300','vgg11') and groups=='inputs':
        for n,g in noise_groups(v).items():
            for p in readers(v, g):
                if p in ('conv0','conv1') and groups=='inputs' and g.n==x.shape[1]: continue       # nobody makes the image's channels
                small = s.get_submodule(p)
                small = small[1] if isinstance(small, nn.Sequential) else small
                assert (small.in_features if isinstance(small, nn.Linear) else small.in_channels)==masks[n].sum(), p

def test_hand_removal_is_the_union_of_masks():
    "Neurons that the next layer does not read go with the inputs that a layer does not read"
    m,x = lenet(),torch.randn(9,1,8,8)
    v = spread(to_variational(m).eval())
    k1,k2,k3 = kept(v).values()
    scale = [g.gamma for g in noise_groups(v).values()]
    z = x.flatten(1)[:,k1]
    for l,rows,cols,g in zip((v.fc1,v.fc2,v.fc3), (k2,k3,torch.ones(10).bool()), (k1,k2,k3), scale):
        z = F.linear(z, (l.weight*g)[rows][:,cols], l.bias[rows])
        if l is not v.fc3: z = z.relu()
    s = shrink(to_deterministic(v), x)
    assert torch.allclose(s(x), z, atol=1e-5)
    assert [tuple(p.shape) for p in s.parameters() if p.ndim>1]==[(int(b.sum()),int(a.sum())) for a,b in ((k1,k2),(k2,k3),(k3,torch.ones(10)))]

def test_channels_and_positions_multiply():
    "A channel goes if its gate or all its positions are noise, a position if either is"
    m,x = net('lenet5')
    v = spread(to_variational(m, x, 'channels').eval(), .5)
    first = next(l for l in variational_layers(v).values() if isinstance(l, GroupLinear))
    gates,masks = list(first.inputs.gates),{g: o for g,o in zip(noise_groups(v).values(), kept(v).values())}
    assert len(gates)==2 and gates[1].n==first.in_features
    alive = torch.tensor([masks[gates[0]][i//(first.in_features//gates[0].n)].item() and masks[gates[1]][i].item() for i in range(first.in_features)])
    with torch.no_grad(): gates[1].gamma_logvar[:first.in_features//gates[0].n] = 4.; alive[:first.in_features//gates[0].n] = False   # all positions of channel 0
    s = shrink(to_deterministic(v), x)
    lin,convs = next(o for o in s.modules() if isinstance(o, nn.Linear)),[o for o in s.modules() if isinstance(o, nn.Conv2d)]
    assert lin.in_features==alive.sum() and convs[-1].out_channels==alive.view(gates[0].n, -1).any(1).sum()

def test_a_concatenation_and_a_sum():
    v = fork()
    for seed in range(5):
        spread(v, .5, seed)
        masks = {g: o for g,o in zip(noise_groups(v).values(), kept(v).values())}
        alive = {p: torch.tensor(places(m.inputs, {g: o.float() for g,o in masks.items()}))>0 for p,m in variational_layers(v).items() if m.inputs is not None}
        s = shrink(to_deterministic(v), XF)
        res,cat = alive['b'],alive['d']
        assert torch.equal(cat[3:], res) and torch.equal(cat[:3], masks[v.d.inputs.gates[0]] if v.d.inputs.gates[0].n==3 else masks[v.d.inputs.gates[1]])
        assert s.a.out_channels==s.b.in_channels==s.b.out_channels==s.c.in_channels==res.sum()
        assert s.d.in_channels==cat.sum() and s.c.out_channels==cat[:3].sum()

@pytest.mark.parametrize('noise', ['group','full'])
@pytest.mark.parametrize('groups', ['neurons','channels','inputs','weights'])
def test_full_noise_everywhere(noise, groups):
    m,x = net('lenet5')
    v = to_variational(m, x, groups, noise)
    assert torch.equal(v.eval()(x), m(x)) and not torch.equal(v.train()(x), m(x))
    having = {p for p,l in variational_layers(v).items() if l.weight_logvar is not None}
    dense = {p for p,l in m.named_modules() if isinstance(l, (nn.Linear,nn.Conv2d))}
    expected = dense if groups=='weights' or noise=='full' and groups!='neurons' else {p for p in dense if p[:2]=='fc'} if noise=='full' else set()
    assert having==expected
    assert all((lv==-9).all() for n,lv in v.named_parameters() if n.endswith('logvar'))
    d = to_deterministic(v, limit=1e9)
    assert torch.equal(d.eval()(x), m(x)) and {n for n,_ in d.named_parameters()}=={n for n,_ in m.named_parameters()}

def test_new_weights():
    m = lenet()
    v = to_variational(m, init_from_pretrained=False)
    assert all(not torch.equal(p, q) for p,q in zip(to_deterministic(v, 1e9).parameters(), m.parameters()))

def test_a_copy_is_made():
    m = lenet()
    m.fc1.weight.requires_grad_(False)
    before,v = state(m),to_variational(m)
    with torch.no_grad():
        for p in v.parameters(): p.add_(1)
    assert same(state(m), before) and type(m.fc1) is nn.Linear and not v.fc1.weight.requires_grad and v.fc1.inputs.gamma.requires_grad
    a = spread(to_variational(lenet()))
    before,modes = state(a),[o.training for o in a.modules()]
    kept(a); to_deterministic(a); weight_bits(a); threshold_curve(a, data().valid, 3)
    assert same(state(a), before) and [o.training for o in a.modules()]==modes and len(variational_layers(a))==3

class Twice(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(4,4),nn.Linear(4,2)
    def forward(self, x): return self.b(self.a(self.a(x)))

def tied(a, b): b.weight = a.weight; return nn.Sequential(a, b)
def shared(): m = nn.Sequential(nn.Linear(3,3), nn.ReLU(), nn.Linear(3,3)); m[2].weight = m[0].weight; return m

@pytest.mark.parametrize('message,f', [
    ('there is nothing to group', lambda: to_variational(nn.Sequential(nn.ReLU()))), ("Try groups='channels'", lambda: to_variational(nn.Conv2d(1,1,3))),
    ('there is nothing to group', lambda: to_variational(nn.Conv2d(1,4,3), torch.randn(1,1,8,8), 'channels')), ('there is nothing to group', lambda: to_variational(nn.ReLU(), groups='weights')),
    ('pass DataLoaders or a batch', lambda: to_variational(lenet(), groups='channels')), ("groups is 'filters'", lambda: to_variational(lenet(), groups='filters')),
    ("noise is 'some'", lambda: to_variational(lenet(), noise='some')), ('variational already', lambda: to_variational(to_variational(lenet()))),
    ("'0' and '2' share a weight", lambda: to_variational(shared())),
    ("'0' and '1' share a weight", lambda: to_variational(tied(nn.Embedding(10,4), nn.Linear(4,10)))), ("'0' and '1' share a weight", lambda: to_variational(tied(nn.Linear(4,10), nn.Embedding(10,4)))),
    ('Use cooldown=None', lambda: quiet(learner(to_variational(lenet(), groups='weights'), cbs=VariationalSparsifier(cooldown=(.5,.8))), 1)), ("layer 'a' runs more than once", lambda: to_variational(Twice(), torch.randn(2,4))),
    ('is a LSTM: recurrent and attention', lambda: to_variational(nn.Sequential(nn.Linear(3,3), nn.LSTM(3,3)))),
    ('the network is a GRUCell', lambda: to_variational(nn.GRUCell(3,3))),
    ("1.self_attn is a MultiheadAttention", lambda: to_variational(nn.Sequential(nn.Linear(4,4), nn.TransformerEncoderLayer(4,2)))),
    ('no variational layer', lambda: kept(lenet())), ('no variational layer', lambda: to_deterministic(lenet())),
    ("how is 'deepest'", lambda: threshold(torch.randn(9), 'deepest')), ("how is 'deepest'", lambda: kept(to_variational(lenet()), 'deepest')),
    ("expected one for each of ['fc1.inputs', 'fc2.inputs', 'fc3.inputs']", lambda: kept(to_variational(lenet()), {'fc1.inputs': 0})),
    ("threshold -20 empties 'fc1.inputs', whose smallest log α is -9.00", lambda: kept(to_variational(lenet()), -20)),
    ('weight is -1', lambda: VariationalSparsifier(-1)), ('gamma_weight is -1', lambda: VariationalSparsifier(gamma_weight=-1)), ('theta_weight is nan', lambda: VariationalSparsifier(theta_weight=math.nan)),
    ("gamma_weight names 'fc9.inputs'", lambda: quiet(learner(cbs=VariationalSparsifier(gamma_weight={'fc9.inputs': 1.})), 1)),
    ('gamma_weight is -2', lambda: VariationalSparsifier(gamma_weight={'fc1.inputs': -2.})),
    ('gamma_lr is -1', lambda: VariationalSparsifier(gamma_lr=-1)), ('warmup is 20', lambda: VariationalSparsifier(warmup=20)),
    ('two rising fractions', lambda: VariationalSparsifier(cooldown=(.8,.5))), ('two rising fractions', lambda: VariationalSparsifier(cooldown=(.5,1.5))),
    ('no variational layer', lambda: quiet(learner(lenet(), cbs=VariationalSparsifier()), 1)),
    ("cap names 'fc9'", lambda: quiet(learner(to_variational(lenet(), noise='full'), cbs=VariationalSparsifier(cap=dict(fc9=.1))), 1)),
    ('weights have a variance: none', lambda: quiet(learner(cbs=VariationalSparsifier(cap=dict(fc1=.1))), 1)),
    ('no parameter group of its own', lambda: quiet(learner(), 1, fit='fit_one_cycle', cbs=VariationalSparsifier()))])
def test_refused_with_a_sentence(message, f):
    with pytest.raises(ValueError) as e: f()
    assert message in str(e.value)

def test_a_stream_has_no_size():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): yield from [(torch.randn(4),torch.tensor(1))]*8
    dls = DataLoaders(DataLoader(Stream(), bs=4), DataLoader(Stream(), bs=4))
    learn = Learner(dls, to_variational(nn.Linear(4,2)), loss_func=CrossEntropyLossFlat(), cbs=VariationalSparsifier())
    with pytest.raises(ValueError, match='size of the training set is unknown'): learn.fit(1)

def test_size_of_the_training_set():
    "All of it, on one process of several too, whatever the batch"
    dls = data(bs=16)
    assert train_size(dls)==len(dls.train.dataset)==train_size(data(bs=150))
    assert train_size(SimpleNamespace(train=ddp.RankDL(dls.train.dataset, bs=8, rank=1, n=2)))==len(dls.train.dataset)


# thresholds

def clusters(n, m, low=-6., high=4., seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=rng)*.7+low,torch.randn(m, generator=rng)*.7+high

@pytest.mark.parametrize('how', ['valley','gap'])
@pytest.mark.parametrize('n,m', [(50,50), (5,500), (500,5), (2000,2000)])
def test_threshold_lies_between_the_clusters(how, n, m):
    signal,noise = clusters(n, m)
    t = threshold([signal, noise], how)
    assert isinstance(t, float) and signal.max()<t<noise.min()
    assert t==threshold(torch.cat([noise, signal]), how)==threshold(dict(a=signal, b=noise), how)
    both = torch.cat([signal, noise])
    if how=='gap':
        v = both.double().sort().values
        i = v.diff().argmax()
        assert abs(t-(v[i]+v[i+1]).item()/2)<1e-9
    else:
        grid = np.linspace(signal.max().item(), noise.min().item(), 400)
        density = np.exp(-(grid[:,None]-both.double().numpy())**2/2).sum(1)
        at = np.exp(-(t-both.double().numpy())**2/2).sum()
        assert at<=density.min()*1.02

@pytest.mark.parametrize('how', ['valley','gap'])
def test_threshold_of_odd_values(how):
    signal,noise = clusters(100, 100)
    assert threshold(signal, how)==threshold(noise, how)==0              # no noise yet; no signal
    for v in (torch.full((5,), -9.), torch.zeros(5), torch.tensor([3.])): assert threshold(v, how)==0
    assert -6<threshold(torch.tensor([-6.,4.]), how)<4
    assert -6<threshold(torch.tensor([-6.]*50+[4.]), how)<4
    t = threshold(torch.cat([signal, noise, torch.tensor([40.,-30.])]), how)
    assert signal.max()<t<noise.min()                                    # outliers
    assert threshold(dict(a=torch.cat([signal, noise]), b=signal), how, per_layer=True)==dict(a=threshold(torch.cat([signal, noise]), how), b=0.)
    assert threshold(torch.cat([signal, noise]).bfloat16().requires_grad_(), how)==pytest.approx(threshold(torch.cat([signal, noise]), how), abs=.3)

def test_kept_by_every_kind_of_threshold():
    v = spread(to_variational(lenet()))
    las = {n: g.log_alpha.detach() for n,g in noise_groups(v).items()}
    for T,limit in ((None,threshold(las)), ('valley',threshold(las)), ('gap',threshold(las, 'gap')), (1,1.), (-3.,-3.)):
        assert same(kept(v, T), {n: o<limit for n,o in las.items()})
    each = threshold(las, per_layer=True)
    assert same(kept(v, each), {n: o<each[n] for n,o in las.items()})
    with torch.no_grad(): v.fc2.inputs.gamma_logvar.fill_(9.); v.fc2.inputs.gamma_logvar[7] = 8.; v.fc2.inputs.gamma.fill_(1.)
    assert kept(v)['fc2.inputs'].nonzero().tolist()==[[7]]               # its best group stays
    with pytest.raises(ValueError, match="empties 'fc2.inputs'"): kept(v, each)
    w = spread(to_variational(lenet(), groups='weights'))
    assert same(kept(w), {n: (m.weight_logvar-(m.weight**2+1e-8).log())<3 for n,m in variational_layers(w).items()})

def test_nan_is_named():
    v = to_variational(lenet())
    with torch.no_grad(): v.fc2.inputs.gamma[3] = float('nan')
    with pytest.raises(ValueError, match="'fc2.inputs' is not finite"): kept(v)

@pytest.fixture(scope='module')
def sparse():
    "A learner whose network has lost groups in training"
    dls = image_dls('digits')
    learn = Learner(dls, lenet((20,)), metrics=accuracy)
    set_seed(0); dls.train.rng = random.Random(0)
    quiet(learn, 5, 5e-3)
    learn = seeded(dls, to_variational(learn.model), wd=0, cbs=VariationalSparsifier(gamma_weight=3))
    return quiet(learn, 25, 2e-3, fit='fit_flat_cos')

def test_training_prunes(sparse):
    learn,small = sparse,sparse.compress()
    dls,masked = learn.dls,to_deterministic(learn.model)
    assert n_weights(small)<.6*n_weights(masked) and accuracy_on(small, dls.valid)>.85
    assert accuracy_on(small, dls.valid)==accuracy_on(masked, dls.valid) and not small.training
    assert max_difference(small, masked, dls.one_batch()[0])<=1e-5
    assert [small.get_submodule(p) if p!='fc1' else small.fc1[1] for p in ('fc1','fc2')][0].in_features==kept(learn.model)['fc1.inputs'].sum()
    T = {'fc1.inputs': 1e9, 'fc2.inputs': threshold(noise_groups(learn.model)['fc2.inputs'].log_alpha)}
    some = learn.compress(T)
    assert some.fc2.in_features==kept(learn.model, T)['fc2.inputs'].sum() and some.fc1.in_features==64

def test_curve_and_accuracy_threshold(sparse):
    model,dl = sparse.model,sparse.dls.valid
    curve = threshold_curve(model, dl, 8)
    assert curve.index.is_monotonic_increasing and len(curve) in (8,9) and curve.weights.is_monotonic_increasing
    for T,row in curve.iloc[::4].iterrows():
        masks,small = kept(model, T),shrink(to_deterministic(model, T), sparse.dls)
        assert row.groups==sum(int(o.sum()) for o in masks.values()) and row.weights==n_weights(small)
        x,y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in dl]) for i in (0,1))
        assert row.accuracy==pytest.approx((small.eval()(x).argmax(1)==y).float().mean().item()) and [row[n] for n in masks]==[int(o.sum()) for o in masks.values()]
    las = [g.log_alpha for g in noise_groups(model).values()]
    assert curve.index[-1]>max(o.max() for o in las) and curve.groups.iloc[-1]==sum(o.numel() for o in las) and curve.index[0]>max(o.min() for o in las)
    for drop in (0., .02, .3, 1.):
        ok = [T for T,a in zip(curve.index, curve.accuracy) if a>=curve.accuracy.iloc[-1]-drop]
        assert accuracy_threshold(model, dl, drop, 8)==min(ok)

def test_the_test_set_is_not_touched(sparse, monkeypatch):
    used,each = [],TensorDL.__iter__
    monkeypatch.setattr(TensorDL, '__iter__', lambda self: (used.append(self.dataset), each(self))[1])
    test = sparse.dls.test.dataset
    sparse.compress('accuracy', max_drop=.05); ThresholdExplorer(sparse, 4)
    assert used and all(o is not test and o is not sparse.dls.train.dataset for o in used)

def test_explorer(sparse, monkeypatch, capsys):
    ex = ThresholdExplorer(sparse, 6)
    valley = threshold({n: g.log_alpha for n,g in noise_groups(sparse.model).items()})
    assert ex.T==ex.limit==min(ex.curve.index, key=lambda T: abs(T-valley))==pytest.approx(valley)
    slider,text = ex.widget().children
    assert slider.value==ex.T and text.value==ex.describe() and [T for _,T in slider.options]==list(ex.curve.index)
    for T in (ex.curve.index[0], ex.curve.index[-1]):
        slider.value = T
        row = ex.curve.loc[T]
        assert ex.T==T and text.value==ex.describe(T)==repr(ex) and f'{int(row.weights):,} weights' in text.value and f'{row.accuracy:.4f}' in text.value
        assert n_weights(ex.compress())==row.weights
    assert all(f'{n} {int(row[n])}' in text.value for n in kept(sparse.model))
    plt.close('all'); ex._ipython_display_()
    assert not plt.get_fignums() or 'VBox' in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    plt.close('all'); capsys.readouterr(); ex._ipython_display_()
    assert ex.describe() in capsys.readouterr().out and len(plt.get_fignums())==1
    plt.close('all')

def test_pictures(sparse):
    las = sparse.variational_sparsifier.log_alphas
    T = threshold(las[-1])
    axs = plot_log_alpha(las, n=3)
    assert len(axs)==3 and [ax.get_title() for ax in axs]==['epoch 1','epoch 13','epoch 25']
    assert sum(b.get_height() for b in axs[-1].patches)==sum(o.numel() for o in las[-1].values())
    ax = plot_kept(las)
    for line,(n,o) in zip(ax.lines, las[-1].items()): assert line.get_ydata()[-1]==pytest.approx((o<T).float().mean().item()) and len(line.get_ydata())==25
    d = to_deterministic(sparse.model)
    axs = plot_weights(d)
    keep = [int(o.sum()) for o in kept(sparse.model).values()]
    assert [ax.get_title() for ax in axs]==[f'fc1: {keep[1]} × {keep[0]} kept',f'fc2: 10 × {keep[1]} kept']
    left,right = plot_threshold(threshold_curve(sparse.model, sparse.dls.valid, 3), T)
    assert len(left.lines)==2 and len(right.lines)==1
    plt.close('all')


# what the posterior says

@each_layer
def test_variance_of_weights(kind, noise, axis, bias):
    m,n = random_layer(kind, noise, axis, bias),60_000
    set_seed(0)
    with torch.no_grad():
        def draw(g, k, shape): return torch.ones(1) if g is None else ((g.gamma_logvar/2).exp()*torch.randn(n, k).double()+g.gamma).view(shape)
        ones = (1,)*(m.weight.ndim-2)
        w = m.weight[None] if m.weight_logvar is None else m.weight + (m.weight_logvar/2).exp()*torch.randn(n, *m.weight.shape).double()
        ws = w*draw(getattr(m, 'inputs', None), m.weight.shape[1], (n,1,-1,*ones))*draw(getattr(m, 'outputs', None), len(m.weight), (n,-1,1,*ones))
        assert torch.allclose(ws.var(0)/weight_variance(m), torch.ones(()).double(), atol=.12)

def test_variance_behind_several_gates():
    set_seed(0)
    v,n = fork('full').double(),40_000
    m = v.out[2]
    draws = {g: (g.gamma_logvar.detach()/2).exp()*torch.randn(n, g.n).double()+g.gamma.detach() for g in m.inputs.gates}
    scale = torch.ones(n, 20).double()
    for i,g in enumerate(m.inputs.gates):
        for at,unit in zip(*getattr(m.inputs, f'places{i}').tolist()): scale[:,at] *= draws[g][:,unit]
    with torch.no_grad():
        w = m.weight[:2] + (m.weight_logvar[:2]/2).exp()*torch.randn(n,2,20).double()
        assert torch.allclose((w*scale[:,None]).var(0)/weight_variance(m)[:2], torch.ones(()).double(), atol=.3)

def test_a_certain_gate_has_a_small_variance():
    g = GroupLinear(4, 4)
    with torch.no_grad(): g.inputs.gamma_logvar.fill_(-20.)
    assert torch.allclose(weight_variance(g), g.weight**2*math.exp(-20), rtol=1e-2, atol=0)

def test_bits_without_noise():
    "The posterior of a network that is certain needs many bits, but no more than a float has"
    bits = weight_bits(still(to_variational(lenet()))).bits
    assert (bits<=32).all()

@pytest.mark.parametrize('noise', ['group','full'])
def test_rounded_weights_are_as_good_as_the_posterior(noise):
    set_seed(0)
    m = nn.Sequential(OrderedDict(fc=nn.Linear(40, 60), act=nn.ReLU(), out=nn.Linear(60, 30)))
    v = spread(to_variational(m, noise=noise), .3)
    table,d = weight_bits(v, 0.),to_deterministic(v, 0.)
    for p in ('fc','out'):
        l,w = v.get_submodule(p),d.get_submodule(p).weight.detach()
        alive = w!=0
        bits = int(table.bits[p])
        step = 2*w.abs().max()/(2**bits-1)
        error = ((w+w.abs().max())/step).round()*step-w.abs().max()-w
        ratio = error[alive].square().mean()/weight_variance(l)[alive].mean()
        assert .1<ratio<1.1, ratio
        n = int(alive.sum())
        assert table.weights[p]==n and table.bytes[p]==math.ceil(n*bits/8)
        x = torch.randn(500, w.shape[1])*alive.any(0)
        outs = F.linear(x, error*alive).square().mean()/F.linear(x.square(), weight_variance(l)*alive).mean()
        assert .1<outs<1.2, outs
    assert table.weights['total']==n_weights(d, nonzero=True) and table.bytes['total']==table.bytes[['fc','out']].sum()
    assert table.bits['total']==pytest.approx(8*table.bytes['total']/table.weights['total'], abs=.06)

def test_bits_say_nothing_else():
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            weight_bits(spread(to_variational(lenet())))
    finally: torch.set_warn_always(False)

def black_border(): return F.pad(torch.ones(4,1,2,2), (3,)*4)

@pytest.mark.parametrize('groups', ['inputs','weights'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_gradients_in_short_numbers(dtype, groups):
    "A convolution without bias sees nothing but black at some places"
    m = nn.Sequential(nn.Conv2d(1,4,3,padding=1,bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,10))
    v = to_variational(m, groups=groups, noise='full').train()
    with torch.autocast('cpu', dtype): out = v(black_border())
    out.float().square().sum().backward()
    assert out.isfinite().all() and not [n for n,p in v.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]


# closed groups

@pytest.mark.parametrize('noise', ['group','full'])
def test_a_closed_group_is_gone(noise):
    v = spread(to_variational(lenet(), noise=noise), .3)
    masks = {n: torch.rand(g.n, generator=torch.Generator().manual_seed(g.n))<.6 for n,g in noise_groups(v).items()}
    for o in masks.values(): o[0] = True
    x,ref = torch.randn(5,1,8,8),deepcopy(v)
    for n,g in noise_groups(v).items(): g.close(masks[n])
    with torch.no_grad():
        for n,g in noise_groups(ref).items(): g.gamma.mul_(masks[n]); g.gamma_logvar[~masks[n]] = -200.
    assert torch.allclose(v.eval()(x), ref.eval()(x), atol=1e-6)
    set_seed(0); a = v.train()(x)
    set_seed(0); b = ref.train()(x)
    assert torch.allclose(a, b, atol=1e-5)                  # neither mean nor noise
    for T in (None, 0., 1e9): assert all(not (o & ~masks[n]).any() for n,o in kept(v, T).items())
    alive = masks['fc2.inputs']
    assert (weight_variance(v.fc2)[:,~alive]==0).all() and (weight_variance(v.fc2)[:,alive]>0).all()
    with torch.no_grad():
        for g in noise_groups(v).values(): g.gamma.add_(1.)    # momentum
    again = to_variational(lenet(), noise=noise)
    again.load_state_dict(v.state_dict())
    for o in (v, deepcopy(v), again):
        assert all(not (k & ~masks[n]).any() for n,k in kept(o, 1e9).items())
        assert (to_deterministic(o, 1e9).fc2.weight[:,~alive]==0).all()
        o.eval()
        assert torch.allclose(to_deterministic(o, 1e9).eval()(x), o(x), atol=1e-6)
        weights = still(deepcopy(o)).train()
        assert torch.allclose(weights(x), o(x), atol=1e-5)
    out = v.train()(x).square().sum()
    out.backward()
    assert (v.fc2.inputs.gamma.grad[~alive]==0).all() and (v.fc2.inputs.gamma_logvar.grad[~alive]==0).all() and v.fc2.inputs.gamma.grad[alive].count_nonzero()>3

def test_noise_is_closed_when_the_kl_begins_to_fall():
    v,opens = spread(to_variational(lenet())),[]
    masks = kept(v)
    class Look(Callback):
        order = 1
        def after_batch(self):
            if self.training: opens.append((self.pct_train, [g.open.bool().clone() for g in noise_groups(v).values()]))
    quiet(learner(v, cbs=[VariationalSparsifier(cooldown=(.5,.8)), Look()]), 4, 0.)
    for i,(pct,o) in enumerate(opens):
        before = i/len(opens)<.5
        assert all(map(torch.equal, o, [torch.ones_like(m) if before else m for m in masks.values()]))
    opens.clear(); quiet(learner(spread(v), cbs=VariationalSparsifier()), 2, 1e-3)
    assert not any((g.open!=m).any() for g,m in zip(noise_groups(v).values(), masks.values()))
    w = spread(to_variational(lenet()))
    quiet(learner(w, cbs=VariationalSparsifier()), 2, 1e-3)
    assert all(g.open.all() for g in noise_groups(w).values())


# training

@pytest.mark.parametrize('cooldown', [None, (.5,.8), (0.,1.), (.1,.15)])
@pytest.mark.parametrize('warmup', [0, .2, 1])
def test_weight_of_the_kl(warmup, cooldown):
    for pct in np.linspace(0, 1, 41):
        rise = 1. if warmup==0 or pct>=warmup else pct/warmup
        fall = 1.
        if cooldown:
            a,b = cooldown
            fall = 1. if pct<=a else 0. if pct>=b else (1+math.cos(math.pi*(pct-a)/(b-a)))/2
        assert kl_schedule(3., warmup, cooldown, float(pct))==pytest.approx(3*rise*fall, abs=1e-12)

class Watched(Callback):
    "Task loss, loss with the KL, and the KL's two parts in each training batch"
    order = 5
    def before_fit(self): self.rows = []
    def after_loss(self):
        if self.training:
            v = unwrap(self.model)
            self.rows.append((self.pct_train, F.cross_entropy(self.pred, *self.yb).item(), self.learn.loss_grad.item(), *(o.item() for o in kl(v))))

@pytest.mark.parametrize('kw', [dict(), dict(weight=2., warmup=0), dict(weight=.5, gamma_weight=7., theta_weight=.1, warmup=.5), dict(theta_weight=0., gamma_weight=0.),
                                dict(weight=lambda pct: 3*(pct>.4), gamma_weight=2.), dict(weight=4., cooldown=(.3,.6)), dict(weight=1)])
@pytest.mark.parametrize('noise', ['group','full'])
def test_loss_by_hand(kw, noise):
    "task + weight(progress)·(gamma_weight·KL_γ + theta_weight·KL_θ)/N, with N the size of the training set"
    look = Watched()
    learn = quiet(learner(spread(to_variational(lenet(), noise=noise), .2), cbs=[VariationalSparsifier(**kw), look]), 4, 1e-3)
    weight,N = kw.get('weight', 1.),len(learn.dls.train.dataset)
    assert N==181
    for pct,task,total,groups,theta in look.rows:
        w = weight(pct) if callable(weight) else kl_schedule(weight, kw.get('warmup', .2), kw.get('cooldown'), pct)
        assert total==pytest.approx(task + w*(kw.get('gamma_weight', 1.)*groups + kw.get('theta_weight', 1.)*theta)/N, rel=1e-4)

@pytest.mark.parametrize('groups', ['neurons','weights'])
def test_weights_of_single_gates(groups):
    v = spread(to_variational(lenet(), groups=groups))
    gates = noise_groups(v)
    first,_,third = gates
    by_hand = sum(w*group_kl(m.log_alpha.double()).sum() for w,m in zip((5.,1.,0.), gates.values()))
    by_gate = {gates[first]: 5., gates[third]: 0.}
    assert kl(v, by_gate)[0].item()==pytest.approx(by_hand.item(), rel=1e-5) and kl(v, by_gate)[1]==kl(v)[1]
    ps = [p for n,p in v.named_parameters() if n.rpartition('.')[2] in (('gamma','gamma_logvar') if groups=='neurons' else ('weight','weight_logvar'))]
    grads = [torch.autograd.grad(o, ps) for o in (kl(v, by_gate)[0], by_hand)]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a,b in zip(*grads))
    look = Watched()
    learn = quiet(learner(v, cbs=[VariationalSparsifier(2., {first: 5., third: 0.}, 3., warmup=0, cap=None), look]), 1, 0.)
    for _,task,total,_,theta in look.rows: assert total==pytest.approx(task + 2*(by_hand.item()+3*theta)/181, rel=1e-4)
    assert learn.recorder.values[-1][3]==pytest.approx((by_hand.item()+3*look.rows[0][-1])/181, rel=1e-4)

@pytest.mark.parametrize('name', ['gamma_weight','theta_weight','gamma_lr'])
def test_schedules_of_other_numbers(name):
    "Either they work or they are refused"
    try: cb = VariationalSparsifier(**{name: SchedLin(0., 1.)})
    except ValueError: return
    quiet(learner(cbs=cb), 1, 1e-3)

@pytest.mark.parametrize('groups,noise', [('neurons','group'), ('channels','group'), ('channels','full'), ('inputs','full'), ('weights','group')])
def test_columns_by_hand(groups, noise):
    dls = data()
    v = spread(to_variational(create('lenet5', dls), dls, groups, noise))
    learn = quiet(learner(v, dls, cbs=VariationalSparsifier(1., 3., .5, warmup=0, cap=None)), 1, 0.)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert list(row)==['train_loss','valid_loss','accuracy','kl','sparsity','groups']
    masks,left,total = {g: o for g,o in zip(noise_groups(v).values(), kept(v).values())},0,0
    for p,l in variational_layers(v).items():
        total += l.weight.numel()
        if groups=='weights': left += int(masks[l].sum())
        elif l.inputs is None: left += l.weight.numel()
        else: left += sum(f>0 for f in places(l.inputs, {g: o.float() for g,o in masks.items()}))*l.weight[:,0].numel()
    assert row['groups']==sum(int(o.sum()) for o in masks.values()) and row['sparsity']==pytest.approx(1-left/total, abs=1e-6)
    a,b = (o.item() for o in kl(v))
    assert row['kl']==pytest.approx((3*a+.5*b)/181, rel=1e-4)
    assert learn.metrics.attrgot('name')==['accuracy']

def test_rates_and_decay_of_noise():
    "γ and log-variances alone, whatever the schedule, have the larger rate in a step and no decay; records show the network's rate"
    lrs = []
    class Look(Callback):
        order = 1
        def before_step(self): lrs.append([h['lr'] for h in self.opt.hypers])
    for fit,args,cbs in (('fit',(2,1e-3),[]), ('fit_one_cycle',(2,1e-3),[]), ('fit_flat_cos',(2,1e-3),[]), ('fit_one_cycle',(2,1e-3),[GradientAccumulation(120)])):
        lrs.clear()
        learn = quiet(learner(to_variational(lenet(), noise='full'), wd=.1, cbs=[VariationalSparsifier(gamma_lr=7), Look(), *cbs]), *args, fit=fit)
        assert lrs and all(a==pytest.approx(7*b) for a,b in lrs)
        assert [h['wd'] for h in learn.opt.hypers]==[0.,.1] and {id(p) for p in learn.opt.param_lists[0]}=={id(p) for n,p in learn.model.named_parameters() if 'gamma' in n or 'logvar' in n}
        assert {h['lr'] for h in learn.opt.hypers}=={learn.opt.hypers[0]['lr']} and sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters()))
        if fit=='fit': assert max(learn.recorder.lrs)==1e-3

class Body(nn.Module):
    "A body and a head, and a factor of its own that is called as those of gates are"
    def __init__(self): super().__init__(); self.body,self.gamma,self.head = lenet().fc1,nn.Parameter(torch.ones(())),nn.Linear(12,10)
    def forward(self, x): return self.head(self.gamma*self.body(x.flatten(1)).relu())

@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.Adam)])
def test_the_head_is_still_the_last_group(opt_func):
    "Frozen, the body stays, head and noise train; `slice(lr)` is for the head, and the noise has a multiple of that; the network's γ is the network's"
    def body(m): return [[*m.body.parameters(), m.gamma], list(m.head.parameters())]
    learn,lrs = learner(to_variational(Body()), splitter=body, opt_func=opt_func, cbs=VariationalSparsifier(gamma_lr=7)),[]
    m,before = learn.model,state(learn.model)
    class Look(Callback):
        order = 1
        def before_step(self): lrs.append([h['lr'] for h in (self.opt.opt.param_groups if isinstance(self.opt, OptimWrapper) else self.opt.hypers)])
    learn.freeze()
    quiet(learn, 1, slice(1e-3), cbs=Look())
    moved = {k for k,v in state(m).items() if not torch.equal(v, before[k])}
    assert moved=={f'{n}.inputs.gamma{o}' for n in ('body','head') for o in ('','_logvar')} | {'head.weight','head.bias'}
    assert all(o==pytest.approx([7e-3,1e-4,1e-3]) for o in lrs) and [h['lr'] for h in learn.opt.hypers]==pytest.approx([1e-4,1e-4,1e-3])
    assert [len(g) for g in learn.opt.param_lists]==[4,3,2] and m.gamma is learn.opt.param_lists[1][2]
    quiet(learn, 1, fit='fine_tune')
    assert all(p.requires_grad for p in m.parameters()) and not torch.equal(m.body.weight, before['body.weight'])

def test_recorded_rates_with_accumulation():
    learn = quiet(learner(cbs=[VariationalSparsifier(gamma_lr=7), GradientAccumulation(120)]), 2, 1e-3)
    assert set(learn.recorder.lrs)=={1e-3}

def test_weight_0_is_plain_training():
    runs = [state(quiet(learner(wd=0, cbs=cbs), 2, 1e-2).model) for cbs in (None, VariationalSparsifier(0, gamma_lr=1), VariationalSparsifier(lambda pct: 0., gamma_lr=1))]
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])

@pytest.mark.parametrize('noise', ['group','full'])
def test_accumulation_is_the_larger_batch(noise):
    def one_step(bs, cbs):
        dls = data(bs=bs)
        dls.train.shuffle = False
        class Stop(Callback):
            def after_batch(self):
                if self.training and (self.iter+1)*bs==64: raise CancelFitException
        v = still(to_variational(lenet(), noise=noise))
        return flat(quiet(learner(v, dls, [VariationalSparsifier(20., warmup=0), Stop(), *cbs], opt_func=SGD, wd=0), 1, .1).model)
    whole = one_step(64, [])
    assert torch.allclose(whole, one_step(16, [GradientAccumulation(64)]), atol=1e-5) and not torch.allclose(whole, flat(still(to_variational(lenet(), noise=noise))), atol=1e-3)

@pytest.mark.parametrize('groups,noise', [('neurons','group'), ('channels','group'), ('channels','full'), ('weights','group')])
@pytest.mark.parametrize('cbs', [lambda: [CPUAutocast()], lambda: [MixUp()], lambda: [CPUAutocast(), GradientClip(1.), GradientAccumulation(100)], lambda: [KnowledgeDistillation(lenet((30,)))]],
                         ids=['bf16','mixup','all','kd'])
def test_with_other_callbacks(cbs, groups, noise):
    dls = data()
    set_seed(0)
    v = to_variational(create('lenet5', dls), dls, groups, noise)
    learn = quiet(learner(v, dls, [VariationalSparsifier(), *cbs()]), 3, 2e-3)
    assert all(p.isfinite().all() for p in learn.model.parameters()) and all(math.isfinite(o) for o in learn.recorder.values[-1])
    before = [o.item() for o in kl(v)]
    with torch.autocast('cpu', torch.bfloat16):
        assert [o.item() for o in kl(v)]==pytest.approx(before, rel=1e-6)
        out = v.train()(dls.one_batch()[0])
        out.float().square().mean().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in v.parameters() if p.grad is not None)

def test_caps_hold():
    def run(cap, groups='inputs', noise='full'):
        dls = data()
        v = to_variational(create('lenet5', dls), dls, groups, noise)
        with torch.no_grad():
            for n,p in v.named_parameters():
                if n.endswith(('weight_logvar','bias_logvar')): p.fill_(0.)
        quiet(learner(v, dls, VariationalSparsifier(cap=cap)), 1, 1e-3)
        return {n.removesuffix('_logvar'): (p/2).exp().max().item() for n,p in v.named_parameters() if n.endswith(('weight_logvar','bias_logvar'))}
    def check(sds, caps):
        for n,sd in sds.items():
            cap = caps.get(n.rpartition('.')[0])
            assert .95*cap<sd<=cap+1e-6 if cap else sd>.9, n
    check(run(.2), dict(conv1=.2)); check(run(.05), dict(conv1=.05))
    check(run(dict(conv2=.3, fc1=.1)), dict(conv2=.3, fc1=.1))
    check(run(None), {}); check(run({}), {}); check(run(.1, 'weights', 'group'), dict(conv1=.1))
    assert set(run(.2))=={f'{l}.{k}' for l in ('conv1','conv2','fc1','fc2','fc3') for k in ('weight','bias')}
    assert run(.2, 'neurons', 'group')=={}

@pytest.mark.parametrize('cap', [-1., dict(fc1=0.)])
def test_bad_caps(cap):
    with pytest.raises(ValueError, match='cap'): quiet(learner(to_variational(lenet(), noise='full'), cbs=VariationalSparsifier(cap=cap)), 1)

def said_in(f):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in said if 'log α over 0' in str(o.message)]

class Cut(Callback):
    "End the fit with epoch `n`"
    order = 90
    def __init__(self, n): self.n = n
    def after_epoch(self):
        if self.epoch+1==self.n: raise CancelFitException

def test_early_warnings():
    def fit(v, n=4, cbs=()): learn = learner(v, cbs=[VariationalSparsifier(), *cbs]); return said_in(lambda: quiet(learn, n, 0.))
    assert [('half of training is over' in o) for o in fit(to_variational(lenet()))]==[True]
    assert fit(to_variational(lenet()), cbs=[Cut(1)])==[]                          # a quarter is no half
    assert len(fit(to_variational(lenet()), cbs=[Cut(3)]))==1
    v = to_variational(lenet())
    with torch.no_grad(): v.fc2.inputs.gamma_logvar[3] = 1.
    assert fit(v)==[]                                                              # one has become noise
    with torch.no_grad(): v.fc2.inputs.gamma_logvar.fill_(1.)
    found = fit(v, cbs=[Cut(1)])
    assert len(found)==1 and "all groups of 'fc2.inputs' are noise" in found[0]
    found = fit(v)
    assert len(found)==1                                                           # once in a fit, and in the next again
    with torch.no_grad(): v.fc3.inputs.gamma_logvar.fill_(1.)
    assert any('fc2.inputs' in o for o in fit(v))
    with torch.no_grad(): v.fc2.inputs.gamma_logvar[0] = v.fc3.inputs.gamma_logvar[0] = -1.
    assert fit(v)==[]

def test_nan_stops_training():
    class Break(Callback):
        order = 1
        def after_batch(self):
            if self.training and self.epoch==1 and self.iter==0:
                with torch.no_grad(): self.model.fc2.inputs.gamma[3] = float('nan')
    learn = learner(cbs=[VariationalSparsifier(), Break()])
    with pytest.raises((FloatingPointError,ValueError)) as e: quiet(learn, 4, 1e-3)
    assert "'fc" in str(e.value) and '.inputs' in str(e.value) and 'is not finite' in str(e.value) and 'diverged' in str(e.value)
    assert len(learn.recorder.values)<3 and learn.metrics.attrgot('name')==['accuracy'] and {h['lr'] for h in learn.opt.hypers}=={1e-3}

def test_a_rate_is_found_without_the_rise():
    "lr_find sees no rising KL, closes nothing, warns of nothing and leaves the history alone"
    rates = []
    for cb in (None, VariationalSparsifier(gamma_weight=50., cooldown=(.1,.2), gamma_lr=1.)):
        set_seed(0)
        learn = learner(cbs=cb)
        with learn.no_bar(),learn.no_logging(),warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            rates.append(learn.lr_find(num_it=60, show_plot=False).valley)
    assert rates[0]==rates[1] and not cb.closed and not cb.log_alphas

def test_history_of_log_alpha():
    learn = quiet(learner(cbs=VariationalSparsifier()), 3, 1e-3)
    las = learn.variational_sparsifier.log_alphas
    quiet(learn, fit='validate')
    with learn.no_bar(): learn.get_preds()
    assert learn.variational_sparsifier.log_alphas is las and len(las)==3
    assert {k: tuple(o.shape) for k,o in las[0].items()}=={'fc1.inputs': (64,), 'fc2.inputs': (12,), 'fc3.inputs': (7,)}
    assert same(las[-1], {n: g.log_alpha.detach() for n,g in noise_groups(learn.model).items()}) and not torch.equal(las[0]['fc2.inputs'], las[1]['fc2.inputs'])
    quiet(learn, 2, 1e-3)
    assert len(learn.variational_sparsifier.log_alphas)==2

def test_validation_is_the_task_without_noise():
    learn = quiet(learner(cbs=VariationalSparsifier(50., warmup=0)), 1, 1e-2)
    x,y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in learn.dls.valid]) for i in (0,1))
    with torch.no_grad(): ref = F.cross_entropy(learn.model.eval()(x), y).item()
    assert learn.recorder.values[-1][1]==pytest.approx(ref, rel=1e-5) and [*learn.validate()][0]==pytest.approx(ref, rel=1e-5)

@pytest.mark.parametrize('groups', ['neurons','channels','weights'])
def test_saved_loaded_exported(groups, tmp_path):
    dls = data()
    def make(): set_seed(4); return learner(to_variational(create('lenet5', dls), dls, groups), dls, VariationalSparsifier(cooldown=None if groups=='weights' else (.5,.8)), path=tmp_path)
    learn = quiet(make(), 2, 1e-2)
    learn.save('a'); learn.export('a.pkl')
    x = dls.one_batch()[0]
    with torch.no_grad(): out = learn.model.eval()(x)
    other = make()
    other.load('a')
    with torch.no_grad(): assert torch.equal(other.model.eval()(x), out) and same(state(other.model), state(learn.model))
    again = load_learner(tmp_path/'a.pkl')
    with torch.no_grad(): assert torch.equal(again.model.eval()(x), out)
    plain = (learn.compress() if groups!='weights' else to_deterministic(learn.model))
    torch.save(plain, tmp_path/'plain.pth')
    with zipfile.ZipFile(tmp_path/'plain.pth') as z: assert not any(b'kdnb.variational' in z.read(n) for n in z.namelist() if n.endswith('.pkl'))

@pytest.mark.parametrize('noise', ['group','full'])
def test_resumed_is_uninterrupted(noise, tmp_path):
    "Saved after an epoch, loaded into a new learner, trained on from there: the same to the bit"
    def make(*cbs): return learner(to_variational(lenet(), noise=noise), cbs=[VariationalSparsifier(cooldown=(.6,.9)), *cbs], path=tmp_path)
    class Keep(Callback):
        order = 90
        def after_epoch(self):
            if self.epoch==1: self.learn.save('mid'); self.rng = torch.get_rng_state(),self.dls.train.rng.getstate()
    keep = Keep()
    whole = quiet(make(keep), 4, 1e-2)
    second = make()
    second.load('mid')
    class Rng(Callback):
        def before_train(self):
            if self.epoch==2: torch.set_rng_state(keep.rng[0]); self.dls.train.rng.setstate(keep.rng[1])
    quiet(second, 4, 1e-2, start_epoch=2, cbs=Rng())
    assert same(state(whole.model), state(second.model))

def test_optimiser_of_the_paper():
    dls = data()
    learn = Learner(dls, to_variational(lenet()), cbs=VariationalSparsifier(gamma_lr=1), **paper_optimizer())
    quiet(learn, 1)
    assert all((h['lr'],h['mom'],h['wd'])==(.003,.5,0.) for h in learn.opt.hypers)
    assert paper_optimizer(.001)['lr']==.001
    p = nn.Parameter(torch.tensor([1.]))
    opt = paper_optimizer()['opt_func']([p], lr=.003)
    for _ in range(2): p.grad = torch.tensor([2.]); opt.step()
    ref = torch.tensor([1.], requires_grad=True)
    sgd = torch.optim.SGD([ref], .003, .5)
    for _ in range(2): ref.grad = torch.tensor([2.]); sgd.step()
    assert torch.allclose(p, ref)

class Apart(nn.Module):
    "Two layers of one gate, each recomputed in the backward pass"
    def __init__(self, again):
        super().__init__()
        self.a,self.b,self.again = GroupLinear(4,4),GroupLinear(4,4),again
        self.b.inputs = self.a.inputs
    def forward(self, x):
        call = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False) if self.again else (lambda f,x: f(x))
        return call(lambda x: self.a(x).tanh(), x) + call(lambda x: self.b(x).tanh(), x)

def test_recomputed_layers_see_the_same_draw():
    import torch.utils.checkpoint
    grads,x = [],torch.randn(3,4).requires_grad_()
    set_seed(0); first = Apart(False)
    first.a.inputs.gamma_logvar.data.fill_(0.)
    for again in (False, True):
        m = deepcopy(first)
        m.again = again
        set_seed(1); m(x).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters()]))
    assert torch.allclose(*grads, atol=1e-6)

@pytest.mark.parametrize('name', ddp.NOISY)
def test_two_processes_equal_one(name, two_ranks):
    "Without noise; the gates move"
    one,first,second = ddp.train(name),*(o[name] for o in two_ranks)
    assert all((v-1).abs().max()>1e-3 for k,v in one.items() if k.endswith('gamma'))
    for k,v in one.items():
        assert torch.equal(first[k], second[k]), k
        assert torch.allclose(first[k], v, atol=1e-5), k

def said_by(f):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        res = f()
    return res,[str(o.message) for o in said if 'weights can ever be cut' in str(o.message) or 'no gates' in str(o.message)]

@pytest.mark.long
@pytest.mark.parametrize('name,kw', [('resnet8',{}), ('vgg8',dict(width=.1)), ('mobilenet_v3_small',dict(width=.25))])
def test_where_there_is_data_convolutions_get_gates_and_else_it_is_said_what_stays(name, kw):
    dls = data()
    learn = Learner(dls, create(name, dls, **kw).eval(), cbs=[])
    x = dls.valid.one_batch()[0]
    learn.model.to(x.device)
    by_hand = to_variational(learn.model, x, 'channels')
    for args in ((learn,), (learn.model, dls), (learn.model, learn), (learn.model, x), (learn, x)):
        v,said = said_by(lambda: to_variational(*args))
        assert list(noise_groups(v))==list(noise_groups(by_hand)) and said==[] and torch.equal(v.eval()(x), learn.model.eval()(x))
    v,(said,) = said_by(lambda: to_variational(learn.model))
    gated,layers = variational_layers(v).values(),[m for m in v.modules() if isinstance(m, weighted)]
    share = sum(m.weight.numel() for m in gated)/sum(m.weight.numel() for m in layers)
    assert all(isinstance(m, nn.Linear) for m in gated) and f'{share:.1%} of the weights can ever be cut: {len(gated)} of' in said
    assert 'Convolutions get them' in said and 'to_variational(learn)' in said
    assert said_by(lambda: to_variational(learn.model, groups='neurons'))[1]==[]                # asked for

def test_the_default_of_networks_that_are_mostly_linear_is_what_it_was():
    dls = data()
    for m in (lenet(), mlp(in_shape=(1,8,8), hidden=16)):
        for args in ((m,), (m, dls), (Learner(dls, m),)):
            v,said = said_by(lambda: to_variational(*args))
            assert list(noise_groups(v))==list(noise_groups(to_variational(m, groups='neurons'))) and said==[]
    assert said_by(lambda: to_variational(create('lenet5')))[1]==[]

def test_what_cannot_have_gates_is_said_or_falls_back():
    net = nn.Sequential(nn.Conv1d(1,4,3), nn.ReLU(), nn.Conv1d(4,8,3), nn.Flatten(), nn.Linear(32,4))
    for args in ((net,), (net, torch.randn(2,1,8))):
        v,(said,) = said_by(lambda: to_variational(*args))
        assert list(variational_layers(v))==['4'] and 'kinds that have none' in said
    class Odd(nn.Module):     # channels nobody can follow
        def __init__(self): super().__init__(); self.c,self.l = nn.Conv2d(1,4,3),nn.Linear(4,3)
        def forward(self, x): return self.l(torch.as_tensor(self.c(x).detach().numpy()).mean((2,3)))
    v,said = said_by(lambda: to_variational(Odd(), torch.randn(2,1,8,8)))
    assert 'l' in variational_layers(v) and len(said)<3
    with pytest.raises(ValueError, match='there is nothing to group.$'): to_variational(nn.Sequential(nn.Conv2d(1,4,3)), torch.randn(2,1,8,8))

def test_gates_are_not_asked_for_noise_while_they_are_frozen():
    def said(fit, *args, **kwargs):
        learn = learner(cbs=VariationalSparsifier(), splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
        if fit=='fit': learn.freeze()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            quiet(learn, *args, fit=fit, **kwargs)
        return [str(o.message) for o in said if 'being pruned' in str(o.message)]
    (once,) = said('fine_tune', 2, 1e-5)
    assert 'half of training is over' in once            # of the second fit, and not of the frozen epoch
    (frozen,) = said('fit', 2)
    assert 'γ is frozen' in frozen and 'unfreeze' in frozen

@pytest.mark.parametrize('opt_func', [Adam, ranger, partial(OptimWrapper, opt=torch.optim.Adam)], ids=['fastai','lookahead','torch'])
def test_after_a_fit_with_its_own_callback_the_optimiser_is_that_of_the_splitter(opt_func, tmp_path):
    "What is kept of each parameter stays; saved, loaded, exported and trained on as any other"
    def fit(learn): return quiet(learn, 1, 1e-3, cbs=VariationalSparsifier())
    learn = fit(learner(opt_func=opt_func, path=tmp_path))
    plain = learner(opt_func=opt_func)
    plain.create_opt()
    names = {id(p): n for m in (learn.model, plain.model) for n,p in m.named_parameters()}
    def groups(o): return [[names[id(p)] for p in g] for g in o.opt.param_lists]
    def moments(o):
        kept = [{k: v for s in param_states(o.opt) for k,v in s.get(p, {}).items()} for g in o.opt.param_lists for p in g]
        return [s.get('grad_avg', s.get('exp_avg')) for s in kept]
    assert groups(learn)==groups(plain) and len(learn.opt.hypers)==1
    before = moments(learn)
    learn.save('x')
    learn.export('x.pkl')
    other = learner(opt_func=opt_func, path=tmp_path).load('x')
    for o in (learn, other):
        assert o.dls.train.n and all(a is not None and torch.equal(a, b) for a,b in zip(before, moments(o)))
    fit(fit(learner(opt_func=opt_func)))            # again with a group of its own
    twice = fit(learner(opt_func=opt_func))
    quiet(twice, 1, 1e-3)
    assert all(v.isfinite().all() for v in state(twice.model).values())
