"Distillation losses against slow references in float64, in low precision, at extreme inputs, and by their invariances."
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from kdnb.distill.losses.features import attention,fsp,nst,pkt,rkd,similarity
from kdnb.distill.losses.logits import binary_kd,dist,dkd,kd,logits_mse,lwf,standardize

# References: one example, channel, pair or triplet at a time

def mean(o): o = list(o); return sum(o)/len(o)
def softmax(z): e = (z-z.max().detach()).exp(); return e/e.sum()
def kl(p, q): return sum(a*(a.log()-b.log()) for a,b in zip(p, q))
def unit(x): return x/x.square().sum().sqrt() if x.any() else torch.zeros_like(x)

def ref_kd(z_s, z_t, T=4.): return T**2*ref_lwf(z_s, z_t, T)
def ref_lwf(z_s, z_t, T=2.): return mean(kl(softmax(t/T), softmax(s/T)) for s,t in zip(z_s, z_t))
def ref_binary_kd(z_s, z_t, T=1.):
    def p(z): return [1/(1+(-z/T).exp()),1/(1+(z/T).exp())]
    return T**2*mean(kl(p(t), p(s)) for s,t in zip(z_s.flatten(), z_t.flatten()))
def ref_logits_mse(z_s, z_t): return mean((s-t)**2 for s,t in zip(z_s.flatten(), z_t.flatten()))

def labels(z): return torch.arange(len(z))*7 % z.shape[1]
def dkd_y(z_s, z_t, **kwargs): return dkd(z_s, z_t, labels(z_s), **kwargs)

def ref_dkd_y(z_s, z_t, alpha=1., beta=8., T=4.):
    def one(s, t, y):
        q,p,rest = softmax(s/T),softmax(t/T),[i for i in range(len(s)) if i!=y]
        tckd = kl([p[y],p[rest].sum()], [q[y],q[rest].sum()])
        nckd = kl(p[rest]/p[rest].sum(), q[rest]/q[rest].sum())
        return T**2*(alpha*tckd+beta*nckd)
    return mean(one(s, t, y) for s,t,y in zip(z_s, z_t, labels(z_s).tolist()))

def ref_dist(z_s, z_t, beta=1., gamma=1., T=1., scaled=True):
    p_s,p_t = (torch.stack([softmax(o/T) for o in z]) for z in (z_s, z_t))
    def gap(a, b): return 1-mean((unit(x-x.mean())*unit(y-y.mean())).sum() for x,y in zip(a, b))
    return (T**2 if scaled else 1)*(beta*gap(p_s, p_t)+gamma*gap(p_s.T, p_t.T))

def ref_standardize(z):
    def one(x): m = mean(x); return (x-m)/((sum((o-m)**2 for o in x)/(len(x)-1)).sqrt()+1e-7)
    return torch.stack([one(x) for x in z])

def same_size(*fs):
    size = min((f.shape[-2:] for f in fs), key=math.prod)
    return [F.adaptive_avg_pool2d(f, size) for f in fs]

def ref_attention(f_s, f_t, p=2, squared=True):
    def one(s, t):
        a,b = (unit(mean(c.abs()**p for c in f).flatten()) for f in (s, t))
        return mean((a-b)**2) if squared else ((a-b)**2).sum().sqrt()
    return mean(one(s, t) for s,t in zip(*same_size(f_s, f_t)))

def ref_nst(f_s, f_t):
    def k(xs, ys): return mean((unit(x)*unit(y)).sum()**2 for x in xs for y in ys)
    return mean(k(t, t)+k(s, s)-2*k(s, t) for s,t in zip(*same_size(f_s, f_t)))

def ref_similarity(f_s, f_t):
    def rows(f): return [unit(torch.stack([(x*y).sum() for y in f])) for x in f]
    return sum(((a-b)**2).sum() for a,b in zip(rows(f_s), rows(f_t)))/len(f_s)**2

def ref_pkt(v_s, v_t, eps=1e-7):
    def rows(v):
        v = [unit(x.flatten(1).mean(1) if x.dim()>1 else x) for x in v]
        k = [[(1+(x*y).sum())/2 for y in v] for x in v]
        return [[o/sum(row) for o in row] for row in k]
    return mean(b*((b+eps)/(a+eps)).log() for p,q in zip(rows(v_s), rows(v_t)) for a,b in zip(p, q))

def ref_fsp(pair_s, pair_t):
    def flow(pair):
        a,b = same_size(*pair)
        return torch.stack([mean(x[:,None,i,j]*y[None,:,i,j] for i in range(a.shape[2]) for j in range(a.shape[3]))
                            for x,y in zip(a, b)])
    return ((flow(pair_s)-flow(pair_t))**2).mean()

def ref_rkd(v_s, v_t, distance=25., angle=50.):
    def relations(v):
        v,n = v.flatten(1),range(len(v))
        d = {(i,j): (v[i]-v[j]).square().sum().sqrt() if (v[i]!=v[j]).any() else v.new_zeros(()) for i in n for j in n}
        scale = mean(o for (i,j),o in d.items() if i!=j)
        u = [[unit(v[i]-v[k]) for i in n] for k in n]
        return [o/scale for o in d.values()],[(u[k][i]*u[k][j]).sum() for k in n for i in n for j in n]
    def smooth_l1(a, b): x = (torch.stack(a)-torch.stack(b)).abs(); return torch.where(x<1, x*x/2, x-.5).mean()
    (d_s,a_s),(d_t,a_t) = relations(v_s),relations(v_t)
    return distance*smooth_l1(d_s, d_t)+angle*smooth_l1(a_s, a_t)

# Inputs: a shape makes a tensor, a pair of shapes a pair of tensors

def each(f, o): return tuple(map(f, o)) if isinstance(o, tuple) else f(o)

def draw(shape, seed, scale=1.5):
    if isinstance(shape[0], tuple): return tuple(draw(o, seed+10*i) for i,o in enumerate(shape, 1))
    return scale*torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)

def value_and_grad(f, s, t, amp=False, **kwargs):
    "The loss and its gradient for the student, one flat vector"
    s = each(lambda o: o.detach().requires_grad_(), s)
    with torch.autocast('cpu', torch.bfloat16, enabled=amp): v = f(s, t, **kwargs)
    return v.detach(),torch.cat([g.flatten() for g in torch.autograd.grad(v, s)])

def close(a, b, rtol=1e-6): return torch.allclose(a, b, rtol=rtol, atol=rtol*max(b.abs().max().item(), 1e-6))

LOGITS = [(s,s) for s in ((5,10),(5,3),(5,2),(1,10),(1,2))]
VECTORS = [((5,7),(5,3)), ((2,4),(2,4)), ((4,2),(4,2))]
MAPS = [((5,3,6,6),(5,4,3,3)), ((5,4,3,4),(5,2,7,5)), ((5,12,3,3),(5,10,6,6)), ((5,4,3,3),(5,12,3,3)),
        ((3,4,2,2),(3,4,2,2))]
ONE = [((1,3,6,6),(1,5,6,6)), ((1,3,4,3),(1,3,1,2))]
PAIRS = [(((5,3,6,6),(5,4,3,3)),((5,3,6,6),(5,4,6,6))), (((1,3,7,5),(1,2,3,4)),((1,3,3,4),(1,2,7,5)))]
ROWS = [
    (kd, ref_kd, [{}, dict(T=1.), dict(T=.5)], LOGITS),
    (binary_kd, ref_binary_kd, [{}, dict(T=4.), dict(T=.5)], [*LOGITS,((5,1),(5,1))]),
    (logits_mse, ref_logits_mse, [{}], LOGITS),
    (dkd_y, ref_dkd_y, [{}, dict(alpha=0., T=1.), dict(alpha=3., beta=.5, T=2.)], LOGITS),
    (dist, ref_dist, [{}, dict(beta=2., gamma=0., T=4.), dict(beta=.5, gamma=3., T=2., scaled=False)], LOGITS[:3]),
    (lwf, ref_lwf, [{}, dict(T=1.)], LOGITS),
    (attention, ref_attention, [{}, dict(squared=False), dict(p=1), dict(p=4, squared=False)], MAPS+ONE),
    (nst, ref_nst, [{}], MAPS+ONE),
    (similarity, ref_similarity, [{}], MAPS+VECTORS),
    (pkt, ref_pkt, [{}, dict(eps=.1)], MAPS+VECTORS),
    (fsp, ref_fsp, [{}], PAIRS),
    (rkd, ref_rkd, [{}, dict(distance=0.), dict(distance=2., angle=0.)], MAPS+VECTORS)]

def name(f, kw, *shapes):
    dims = ['+'.join('x'.join(map(str, o)) for o in (s if isinstance(s[0], tuple) else (s,))) for s in shapes]
    return '-'.join([f.__name__, *(f'{k}={v}' for k,v in kw.items()), *dims])

GRID = [pytest.param(f, ref, kw, *ss, id=name(f, kw, *ss)) for f,ref,kws,shapes in ROWS for kw in kws for ss in shapes]
ONE_EACH = [pytest.param(f, kw, *shapes[0], id=name(f, kw)) for f,_,kws,shapes in ROWS for kw in kws]
FEATURES = [pytest.param(f, *shapes[0], id=f.__name__) for f,_,_,shapes in ROWS[6:]]

# Values and gradients

@pytest.mark.parametrize('f,ref,kw,shape_s,shape_t', GRID)
def test_against_the_reference(f, ref, kw, shape_s, shape_t):
    s,t = draw(shape_s, 0),draw(shape_t, 1)
    (v,g),(v_ref,g_ref) = value_and_grad(f, s, t, **kw),value_and_grad(ref, s, t, **kw)
    assert v.shape==() and v.dtype==torch.float64
    assert close(v, v_ref) and close(g, g_ref)

@pytest.mark.parametrize('shape', [(1,2), (1,10), (5,2), (5,3)])
def test_standardize_against_the_reference(shape):
    z,w = draw(shape, 0),draw(shape, 1)
    (v,g),(v_ref,g_ref) = (value_and_grad(lambda z,w: (h(z)*w).sum(), z, w) for h in (standardize, ref_standardize))
    assert close(standardize(z), ref_standardize(z)) and close(v, v_ref) and close(g, g_ref)

def test_closed_forms_far_out():
    "Logits of ±200, T 4: log-probabilities of 0 and -100"
    z_s,z_t,y = torch.tensor([[-200.,200,-200]]),torch.tensor([[200.,-200,-200]]),torch.tensor([0])
    for got,want in ((kd(z_s, z_t), 1600), (binary_kd(z_s, z_t, T=1.), 400/3), (lwf(z_s, z_t), 200), (logits_mse(z_s, z_t), 320_000/3),
                     (kd(z_s[:,:2], z_t[:,:2], T=1.), 400), (dkd(z_s[:,:2], z_t[:,:2], y), 1600),
                     (dkd(z_s, z_t, y), 16*(100+8*(50-math.log(2)))), (dkd(z_s, z_t, y+2, alpha=0.), 16*8*100)):
        assert got.item()==pytest.approx(want, rel=1e-5)

def test_closed_forms_of_features():
    "Student and teacher that share nothing"
    a,b = (torch.tensor(o).double() for o in ([[3.,0],[0,5]],[[0,7.],[2,0]]))
    f_s,f_t = a[:,None,None],b[:,None,None]                         # two examples, one channel, 1x2 pixels
    assert close(attention(f_s, f_t), torch.tensor(1.).double())
    assert close(attention(f_s, f_t, squared=False), torch.tensor(2.).double().sqrt())
    assert close(nst(f_s, f_t), torch.tensor(2.).double())
    assert close(similarity(a, torch.ones_like(b)), torch.tensor((2*(1-.5**.5)**2+1)/4).double())
    rows = (math.log(.5/(2/3))+math.log(.5/(1/3)))/4                # cosines 0 against 1: (⅔, ⅓) against (½, ½)
    assert pkt(a, torch.ones_like(b)).item()==pytest.approx(rows, rel=1e-5)
    assert close(fsp((f_s,f_s), (f_t,f_t)), torch.tensor(((9-49)**2/4+(25-4)**2/4)/2).double())
    right,straight = torch.tensor([[0.,0],[0,1],[1,0]]).double(),torch.tensor([[0.],[-1],[1]]).double()
    d,e = (2+2**.5)/3,4/3                                           # the means of 1, 1, √2 and of 1, 1, 2
    assert rkd(right, straight, angle=0.).item()==pytest.approx(25*(2*(1/d-1/e)**2+(2**.5/d-2/e)**2)/9, rel=1e-6)
    cos = 2*.5+2*2*.5*(1-.5**.5)**2                                 # corner: 0 against -1; ends: √½ against 1
    assert rkd(right, straight, distance=0.).item()==pytest.approx(50*cos/27, rel=1e-6)

# Precision

@pytest.mark.parametrize('f,kw,shape_s,shape_t', ONE_EACH)
def test_float32_is_close_to_float64(f, kw, shape_s, shape_t):
    s,t = (each(torch.Tensor.float, draw(o, i)) for i,o in enumerate((shape_s, shape_t)))
    s64,t64 = (each(torch.Tensor.double, o) for o in (s, t))
    (v,g),(v64,g64) = value_and_grad(f, s, t, **kw),value_and_grad(f, s64, t64, **kw)
    assert v.dtype==torch.float32
    assert close(v.double(), v64, 1e-4) and close(g.double(), g64, 1e-4)

def test_rkd_far_from_the_origin_in_float32():
    "Where distances from inner products lose their digits; from 26 rows on `torch.cdist` uses them"
    s,t = (draw((30,8), i).float()+300 for i in range(2))
    (v,g),(v64,g64) = value_and_grad(rkd, s, t),value_and_grad(rkd, s.double(), t.double())
    assert close(v.double(), v64, 1e-4) and close(g.double(), g64, 1e-4)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('f,kw,shape_s,shape_t', ONE_EACH)
def test_low_precision_is_cast_up_first(f, kw, shape_s, shape_t, dtype):
    low = [each(lambda o: o.to(dtype), draw(o, i)) for i,o in enumerate((shape_s, shape_t))]
    s,t = (each(torch.Tensor.float, o) for o in low)
    v,g = value_and_grad(f, s, t, **kw)
    for a,b,amp in ((*low,False), (low[0],t,False), (s,low[1],False), (*low,True), (s,t,True), (low[0],t,True)):
        v_low,g_low = value_and_grad(f, a, b, amp, **kw)
        assert v_low.dtype==torch.float32 and close(v_low, v)
        assert close(g_low.float(), g, 1e-6 if a is s else 1e-2)

def test_standardize_in_low_precision():
    z = draw((5,10), 0).bfloat16()
    with torch.autocast('cpu', torch.bfloat16): got = standardize(z)
    assert got.dtype==torch.float32 and close(got, standardize(z.float()))

@pytest.mark.parametrize('f,shape_s,shape_t', FEATURES)
def test_memory_format_does_not_matter(f, shape_s, shape_t):
    s,t = draw(shape_s, 0),draw(shape_t, 1)
    last = [each(lambda o: o.contiguous(memory_format=torch.channels_last), o) for o in (s, t)]
    (v,g),(v_ref,g_ref) = value_and_grad(f, *last),value_and_grad(f, s, t)
    assert close(v, v_ref) and close(g, g_ref)

def no_row(x, i=0): x = x.clone(); x[i] = 0; return x
def no_column(x): x = x.clone(); x[:,0] = 0; return x
def rows_equal(x): return x[:1].expand_as(x).clone()
def two_equal(x): x = x.clone(); x[1] = x[0]; return x
def large(x): return 200*x.sign() if x.dim()==2 else 300*x.abs().clamp(max=1)

HARD = dict(large=(large,large), zero_student=(torch.zeros_like,None), zero_teacher=(None,torch.zeros_like),
    both_zero=(torch.zeros_like,torch.zeros_like), zero_row=(no_row,None), zero_rows=(no_row,lambda x: no_row(x, 1)),
    zero_channel=(no_column,None), equal_student=(rows_equal,None), equal_teacher=(None,rows_equal),
    both_equal=(rows_equal,rows_equal), two_equal=(two_equal,None), two_equal_teacher=(None,two_equal))

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=['fp32','bf16','fp16'])
@pytest.mark.parametrize('hard', HARD)
@pytest.mark.parametrize('f,kw,shape_s,shape_t', ONE_EACH)
def test_finite(f, kw, shape_s, shape_t, hard, dtype):
    "float16 ends at 65504: a gradient of 1/eps would be seen there"
    shapes,changes = (shape_s, shape_t),HARD[hard]
    s,t = (each(lambda o: (h(o) if h else o).to(dtype), draw(shapes[i], i)) for i,h in enumerate(changes))
    v,g = value_and_grad(f, s, t, **kw)
    assert v.shape==() and v.dtype==torch.float32 and v.isfinite()
    assert g.dtype==dtype and g.isfinite().all()

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=['fp32','bf16','fp16'])
def test_finite_standardize(dtype):
    for z in (torch.zeros(5,10), torch.ones(5,10)*200, large(draw((5,10), 0)), no_row(draw((5,10), 0))):
        z = z.to(dtype)
        assert standardize(z).dtype==torch.float32 and standardize(z).isfinite().all()
        if dtype!=torch.float16:                                          # 1/1e-7 does not fit
            g = value_and_grad(lambda a,b: kd(standardize(a), standardize(b), 2.), z, draw((5,10), 1))[1]
            assert g.isfinite().all()

@pytest.mark.parametrize('f', [similarity, pkt, rkd])
@pytest.mark.parametrize('shape', [(1,7), (1,3,2,2)])
def test_one_example_has_no_relations(f, shape):
    v,g = value_and_grad(f, draw(shape, 0), draw(shape, 1))
    assert abs(v)<1e-12 and close(g, torch.zeros_like(g))

def test_dist_of_one_example_compares_its_classes():
    z_s,z_t = draw((1,10), 0),draw((1,10), 1)
    (v,g),(v_ref,g_ref) = value_and_grad(dist, z_s, z_t, gamma=0.),value_and_grad(ref_dist, z_s, z_t, gamma=0.)
    both,g_both = value_and_grad(dist, z_s, z_t)
    assert close(v, v_ref) and close(g, g_ref) and both.isfinite() and close(g_both, g_ref)

def test_equal_rows_count_in_the_mean_distance():
    s,t = two_equal(draw((5,3), 0)),two_equal(rows_equal(draw((4,3), 1).repeat(2,1)[:5])+draw((5,3), 2))
    assert close(rkd(s, t), ref_rkd(s, t))

# Identities

@pytest.mark.parametrize('f,kw,shape_s,shape_t', ONE_EACH)
def test_equal_inputs_give_0(f, kw, shape_s, shape_t):
    for dtype,eps in ((torch.float64,1e-12),(torch.float32,1e-5)):
        t = each(lambda o: o.to(dtype), draw(shape_s, 1))
        v,g = value_and_grad(f, t, t, **kw)
        assert abs(v)<eps and g.isfinite().all() and (dtype==torch.float32 or 'eps' in kw or g.abs().max()<1e-6)

@pytest.mark.parametrize('T', [.5, 1., 4.])
@pytest.mark.parametrize('C', [2, 3, 10])
def test_kd_is_target_and_non_target_parts(T, C):
    z_s,z_t = draw((5,C), 0),draw((5,C), 1)
    y = labels(z_s)
    for i in range(5):
        one,p = slice(i,i+1),(z_t[i]/T).softmax(0)[y[i]].item()
        (v,g),(v_kd,g_kd) = (value_and_grad(f, z_s[one], z_t[one]) for f in
                             (lambda a,b: dkd(a, b, y[one], alpha=1., beta=1-p, T=T), lambda a,b: kd(a, b, T)))
        assert close(v, v_kd) and close(g, g_kd)

def test_dkd_follows_its_labels():
    z_s,z_t = draw((5,10), 0),draw((5,10), 1)
    y,perm = labels(z_s),torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert close(dkd(z_s[:,perm], z_t[:,perm], perm.argsort()[y]), dkd(z_s, z_t, y))
    assert abs(dkd(z_s, z_t, (y+1)%10)-dkd(z_s, z_t, y))>.1
    with pytest.raises(TypeError): dkd(z_s, z_t)

@pytest.mark.parametrize('T', [1., 4.])
def test_kd_gradient_and_limit(T):
    z_s,z_t = draw((5,10), 0),draw((5,10), 1)
    g = value_and_grad(kd, z_s, z_t, T=T)[1]
    assert close(g, (T*((z_s/T).softmax(1)-(z_t/T).softmax(1))/5).flatten())
    assert close(g, T**2*value_and_grad(lwf, z_s, z_t, T=T)[1])
    d = z_s-z_t
    assert close(kd(z_s, z_t, T=1e4), ((d-d.mean(1, keepdim=True))**2).sum(1).mean()/20, 1e-3)

@pytest.mark.parametrize('alpha', [.1, .5, .9])
def test_kd_is_cross_entropy_on_smoothed_labels(alpha):
    "Park and No 2022, eq. (3): equal gradients, and a difference that is the teacher's entropy whatever the student"
    z_t = draw((5,10), 1)
    y,p = labels(z_t),z_t.softmax(1)
    soft = (1-alpha)*F.one_hot(y, 10)+alpha*p
    def mixed(z, z_t): return (1-alpha)*F.cross_entropy(z, y)+alpha*kd(z, z_t, T=1.)
    def smoothed(z, z_t): return -(soft*z.log_softmax(1)).sum(1).mean()
    for z in (draw((5,10), 0), draw((5,10), 2, scale=4.), torch.zeros(5,10).double()):
        (v,g),(v_ref,g_ref) = value_and_grad(mixed, z, z_t),value_and_grad(smoothed, z, z_t)
        assert close(g, g_ref) and close(v_ref-v, -alpha*(p*p.log()).sum(1).mean())

@pytest.mark.parametrize('T', [1., 4.])
@pytest.mark.parametrize('C', [3, 10])
def test_dist_sees_no_shift_and_scale_of_probabilities(T, C):
    z_s,z_t = draw((5,C), 0),draw((5,C), 1)
    def shifted(z, a): return T*(a*(z/T).softmax(1)+(1-a)/C).log()
    per_row = torch.linspace(.1, .9, 5).double()[:,None]
    assert close(dist(shifted(z_s, .3), z_t, T=T), dist(z_s, z_t, T=T))
    assert close(dist(shifted(z_s, per_row), z_t, gamma=0., T=T), dist(z_s, z_t, gamma=0., T=T))
    assert abs(dist(shifted(z_s, per_row), z_t, beta=0., T=T)-dist(z_s, z_t, beta=0., T=T))>1e-3
    assert abs(dist(shifted(z_t, .3), z_t, T=T))<1e-5
    opposite = dist(shifted(z_t, -1/(C-1)), z_t, beta=2., gamma=3., T=T)
    assert opposite.item()==pytest.approx(10*T**2, rel=1e-5)
    assert close(dist(z_s, z_t, T=T), T**2*dist(z_s, z_t, T=T, scaled=False))

def rotate(x): q = torch.linalg.qr(draw((x[0].numel(),)*2, 5))[0]; return (x.flatten(1)@q).view_as(x)
def per_example(x): return torch.linspace(.5, 3, len(x)).double().view(-1,*[1]*(x.dim()-1))*x
def per_channel(x): return torch.linspace(-2, 3, x.shape[1]).double()[:,None,None]*x

def bigger(x): return 3*x
def moved(x): return x+5
def channels_rolled(x): return x.roll(1, 1)
def columns_rolled(x): return x.roll(1, 3)

INVARIANT = {similarity: [rotate,bigger], pkt: [per_example], rkd: [rotate,moved,bigger],
             attention: [channels_rolled,per_example,torch.neg], nst: [channels_rolled,per_channel]}

@pytest.mark.parametrize('f,change', [(f,c) for f,cs in INVARIANT.items() for c in cs])
def test_invariance(f, change):
    s,t = draw((5,4,3,3), 0),draw((5,4,3,3), 1)
    assert f(s, t)>1e-6 and not torch.equal(change(s), s)
    for a,b in ((change(s),t), (s,change(t)), (change(s),change(t))): assert close(f(a, b), f(s, t))

@pytest.mark.parametrize('f', [similarity, pkt, rkd])
def test_rotated_vectors(f):
    s,t = draw((5,7), 0),draw((5,4), 1)
    assert close(f(rotate(s), rotate(t)), f(s, t)) and abs(f(rotate(s)[:,:3], t)-f(s, t))>1e-6

def test_pixels_moved_alike():
    (a,b),(c,d) = s,t = [draw(((5,3,4,4),(5,2,4,4)), i) for i in range(2)]
    s_moved,t_moved = (each(columns_rolled, o) for o in (s, t))
    assert close(fsp(s_moved, t), fsp(s, t)) and abs(fsp((s_moved[0],b), t)-fsp(s, t))>1e-6
    for f in (nst, attention):
        assert close(f(s_moved[0], t_moved[1]), f(a, d)) and abs(f(s_moved[0], d)-f(a, d))>1e-6

def test_standardize_forgets_scale_and_shift():
    z = draw((5,10), 0)
    for a,b in ((3.,0.), (.5,-7.), (torch.linspace(.5, 3, 5).double()[:,None],torch.arange(5).double()[:,None])):
        assert close(standardize(a*z+b), standardize(z))
        assert kd(standardize(a*z+b), standardize(z), T=2.).abs()<1e-9
    assert close(standardize(-z), -standardize(z)) and close(standardize(z).std(1), torch.ones(5).double())

@pytest.mark.parametrize('f', [kd, binary_kd, logits_mse, dkd, dist, lwf])
def test_pixels_and_places_are_samples(f):
    (s,t),y = (draw((2,5,3,4), i) for i in range(2)),torch.arange(24).view(2,3,4) % 5
    more = lambda y: (y,) if f is dkd else ()
    rows = lambda z: z.permute(0,2,3,1).reshape(24, 5)
    v = f(rows(s), rows(t), *more(y.view(24)))
    assert close(f(s, t, *more(y)), v)
    s_,t_ = (rows(z).view(2,12,5) for z in (s, t))
    assert close(f(s_, t_, *more(y.view(2,12))), v)
    assert close(rows(standardize(s)), standardize(rows(s)))
    with pytest.raises(ValueError, match='teacher gives 4 outputs, student 5'): f(s, t[:,:4], *more(y))

def test_a_label_is_a_choice_between_two_classes():
    "And the labels know nothing of each other, as classes do"
    s,t = draw((5,4), 0),draw((5,4), 1)
    assert close(binary_kd(s, t, T=3.), mean(kd(*(torch.stack([z[:,i]/2,-z[:,i]/2], 1) for z in (s, t)), T=3.) for i in range(4)))
    v,g = value_and_grad(lambda a,b: binary_kd(a, b, T=3.)*20/9, s, t)
    assert close(g.view(5,4), ((s/3).sigmoid()-(t/3).sigmoid())/3)

# Errors

@pytest.mark.parametrize('f', [kd, binary_kd, dkd_y, dist, lwf])
@pytest.mark.parametrize('T', [0, -1])
def test_error_temperature(f, T):
    with pytest.raises(ValueError, match='T is'): f(torch.zeros(5,10), torch.zeros(5,10), T=T)

@pytest.mark.parametrize('f', [kd, binary_kd, logits_mse, dkd_y, dist, lwf])
def test_error_classes(f):
    with pytest.raises(ValueError, match='teacher gives 7 outputs, student 10'): f(torch.zeros(5,10), torch.zeros(5,7))

@pytest.mark.parametrize('f', [kd, dkd_y, dist, lwf])
def test_error_regression(f):
    with pytest.raises(ValueError, match='one number for each sample.*LogitsMSE'): f(torch.zeros(5,1), torch.ones(5,1))
    assert logits_mse(torch.zeros(5,1), torch.ones(5,1))==1

@pytest.mark.parametrize('y', [torch.zeros(5,10), torch.full((5,10), .1), torch.zeros(5), torch.zeros(4).long(), torch.zeros(5,10).long()])
def test_dkd_names_what_it_needs(y):
    with pytest.raises(ValueError, match='DKD needs the number of the right class .* BinaryKD .* LogitsMSE'): dkd(torch.zeros(5,10), torch.ones(5,10), y)

@pytest.mark.parametrize('f', [attention, nst, similarity, pkt, rkd])
@pytest.mark.parametrize('b_s,b_t', [(5,4), (1,5), (5,1)])
def test_error_batch(f, b_s, b_t):
    with pytest.raises(ValueError, match='batch'): f(torch.ones(b_s,3,4,4), torch.ones(b_t,3,4,4))

@pytest.mark.parametrize('f', [attention, nst])
@pytest.mark.parametrize('shape_s,shape_t', [((5,3),(5,3,4,4)), ((5,3,4,4),(5,3)), ((5,3),(5,3))])
def test_error_no_map(f, shape_s, shape_t):
    with pytest.raises(ValueError, match=re.escape('(B, C, H, W)')): f(torch.ones(shape_s), torch.ones(shape_t))

@pytest.mark.parametrize('c_s,c_t', [((3,4),(5,4)), ((3,4),(3,1)), ((1,4),(3,4))])
def test_error_channels(c_s, c_t):
    with pytest.raises(ValueError, match='channels'): fsp(*(tuple(torch.ones(5,c,4,4) for c in o) for o in (c_s, c_t)))


class Largest(TorchDispatchMode):
    n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        self.n = max(self.n, *(o.numel() for o in tree_leaves(out) if isinstance(o, torch.Tensor)), 0)
        return out

@pytest.mark.parametrize('c,side', [(64,4), (16,16)])   # more channels than places, and fewer
def test_nst_never_broadcasts_pairs_of_channels(c, side):
    f_s,f_t = torch.randn(4, c, side, side, requires_grad=True),torch.randn(4, c, side, side)
    with Largest() as o: nst(f_s, f_t).backward()
    assert o.n==f_s.numel()
