"Variational layers against slow references in float64; thresholds; what compress returns."
import pytest
from scipy.special import digamma
from scipy.stats import poisson
from kdnb.all import *

def test_group_kl_values_and_gradient():
    la = torch.tensor([-9.,-4.6,-4.5,0,3,12], dtype=torch.double, requires_grad=True)
    for exact in (False, True): assert torch.autograd.gradcheck(lambda o: group_kl(o, exact), la)
    for a,kl in zip(la.tolist(), group_kl(la, True).tolist()):
        lam = .5*math.exp(-a); j = np.arange(max(0, int(lam-40*lam**.5)), int(lam+40*lam**.5+60))
        assert abs(kl - .5*((poisson.pmf(j, lam)*digamma(j+.5)).sum()-digamma(.5))) < 1e-9
    sig = lambda t: 1/(1+math.exp(-t))
    ref = [.63576 - .63576*sig(1.87320+1.48695*a) + .5*math.log(1+math.exp(-a)) for a in la.tolist()]
    assert torch.allclose(group_kl(la), torch.tensor(ref, dtype=torch.double), rtol=1e-9)

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

def random_layer(noise, bias=True):
    lin = GroupLinear(5, 4, bias=bias, noise=noise).double()
    with torch.no_grad():
        for n,p in lin.named_parameters(): p.copy_(torch.randn_like(p)-2*n.endswith('logvar'))
    return lin

@pytest.mark.parametrize('noise', ['group','full'])
@pytest.mark.parametrize('bias', [True, False])
def test_kl_of_a_layer(noise, bias):
    lin,ref = random_layer(noise, bias),0.
    for n in ('weight','bias'):
        p,lv = getattr(lin, n),getattr(lin, f'{n}_logvar')
        if p is None: continue
        for i,m in enumerate(p.flatten().tolist()):
            v = 1. if lv is None else math.exp(lv.flatten()[i].item())
            ref += .5*(v+m*m-math.log(v)-1)
    assert abs(kl(lin)[1].item()-ref) < 1e-6*ref

@pytest.mark.parametrize('noise', ['group','full'])
def test_mean_and_variance_of_the_output(noise):
    set_seed(0)
    lin,x,n = random_layer(noise),torch.randn(5).double(),20_000
    with torch.no_grad():
        outs = torch.stack([lin(x[None])[0] for _ in range(n)])      # one draw a call: γ may be shared by a batch
        s2g = lin.inputs.gamma_logvar.exp()
        var = ((x**2*s2g)[None]*lin.weight**2).sum(1)
        if noise=='full': var = var + ((x**2*(lin.inputs.gamma**2+s2g))[None]*lin.weight_logvar.exp()).sum(1) + lin.bias_logvar.exp()
        assert ((outs.mean(0)-F.linear(x*lin.inputs.gamma, lin.weight, lin.bias)).abs() < 5*(var/n).sqrt()).all()
        assert torch.allclose(outs.var(0)/var, torch.ones(4).double(), atol=.06)

def test_full_noise_is_drawn_per_example():
    lin = GroupLinear(5, 4, noise='full')
    a,b = lin(torch.ones(2,5))
    assert not torch.equal(a, b)

def test_evaluation_is_the_mean_and_deterministic_is_evaluation():
    v = to_variational(lenet300(in_shape=(1,8,8))).eval()
    x = torch.randn(3,1,8,8)
    with torch.no_grad():
        for g in noise_groups(v).values(): g.gamma.normal_()
    assert torch.equal(v(x), v(x))
    assert torch.equal(to_deterministic(v, T=1e9)(x), v(x))

@pytest.mark.parametrize('make', [lenet300, lenet5, lenet5_caffe])
def test_conversion_keeps_answers_and_masked_is_shrunken(make):
    set_seed(0)
    m,x = make(in_shape=(1,16,16)).eval(),torch.randn(3,1,16,16)
    v = to_variational(m)
    assert torch.equal(v(x), m(x)) and m.arch==v.arch
    with torch.no_grad():
        for g in noise_groups(v).values(): g.gamma_logvar.copy_(torch.where(torch.rand(g.n)<.7, 3., -8.))
    d = to_deterministic(v)
    s = shrink(d, x)
    assert max_difference(s, d, x) <= 1e-5
    keep = [k.sum().item() for k in kept(v).values()]
    assert [l.in_features for l in s.modules() if isinstance(l, nn.Linear)]==keep
    assert not any(type(l).__module__.startswith('kdnb') for l in s.modules())
    assert n_weights(s) < n_weights(d, nonzero=True)

def test_cap_holds():
    set_seed(0)
    dls = image_dls('digits', device='cpu')
    v = to_variational(create('lenet300', dls, hidden=(8,)), noise='full')
    with torch.no_grad(): v.fc1.weight_logvar.fill_(0.)
    learn = Learner(dls, v, cbs=VariationalSparsifier(cap=.2))
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-3)
    assert v.fc1.weight_logvar.max() <= 2*math.log(.2)+1e-6 and v.fc2.weight_logvar.max() > -9

def test_kl_is_divided_by_the_training_set():
    dls = image_dls('digits', n_per_class=10, device='cpu')
    v = to_variational(create('lenet300', dls, hidden=(8,)))
    seen = []
    class Look(Callback):
        order = -2
        def after_loss(self):
            if self.training: seen.append((self.learn.loss_grad.item(), sum(kl(v)).item()))
    class After(Callback):
        order = 5
        def after_loss(self):
            if self.training: seen.append(self.learn.loss_grad.item())
    learn = Learner(dls, v, cbs=[VariationalSparsifier(weight=2., warmup=0), Look(), After()])
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-3)
    (task,div),total = seen[:2]
    assert abs(total-task-2*div/100) < 1e-4*total

def test_a_stream_has_no_size():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): yield from [(torch.randn(4),torch.tensor(1))]*8
    dls = DataLoaders(DataLoader(Stream(), bs=4), DataLoader(Stream(), bs=4), device='cpu')
    learn = Learner(dls, to_variational(nn.Linear(4,2)), loss_func=CrossEntropyLossFlat(), cbs=VariationalSparsifier())
    with pytest.raises(ValueError, match='size of the training set is unknown'): learn.fit(1)

def test_history_and_resumed_state():
    dls = image_dls('digits', device='cpu')
    learn = Learner(dls, to_variational(create('lenet300', dls, hidden=(8,))), cbs=VariationalSparsifier())
    with learn.no_bar(),learn.no_logging(): learn.fit(3, 1e-3)
    learn.validate()
    assert len(learn.variational_sparsifier.log_alphas)==3
    assert {k: tuple(v.shape) for k,v in learn.variational_sparsifier.log_alphas[0].items()}=={'fc1.inputs': (64,), 'fc2.inputs': (8,)}

def test_nan_is_named():
    v = to_variational(lenet300())
    with torch.no_grad(): v.fc2.inputs.gamma[3] = float('nan')
    with pytest.raises(ValueError, match="'fc2.inputs' is not finite"): kept(v)
