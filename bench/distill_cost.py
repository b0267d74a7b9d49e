"What distillation costs, beside the limits that are wanted and beside fasterai; measured as in step_cost.py."
import sys

from step_cost import *
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.resnet import BasicBlock, ResNet

sys.path.append(str(Path(__file__).parent/'.peers'))
try: from fasterai.distill import all as fasterai; from fasterai import __version__ as peer_version
except ImportError: fasterai = None

def report(fs, rounds, *rows):
    "Time the functions `fs`; a row is the name of one, of the one to compare it with, and the most that is wanted"
    ms = dict(zip(fs, median_ms(list(fs.values()), rounds)))
    for name,base,most in rows:
        print(f'{name:35} {ms[name]:7.1f} ms = {ms[name]/ms[base]:.2f} × {base} ({ms[base]:.1f} ms)'
              + (f', at most {most} wanted' if most else ''))

def peer(teacher, loss='SoftTarget', layers=(), frozen=False):
    "fasterai's callback with a teacher of its own"
    teacher,layers = deepcopy(teacher).requires_grad_(not frozen),list(layers)
    return fasterai.KnowledgeDistillationCallback(teacher, getattr(fasterai, loss), [f'model.{o}' for o in layers], layers)

def mlps(rounds=201):
    print(f'\nLeNet-300-100 taught by LeNet-5, batch 256, medians of {rounds} steps')
    teacher = lenet5().eval()
    def new(*args, **kwargs): return stepper(lenet300(), *args, **kwargs)
    fs = {'plain + teacher': new(teacher=teacher), 'KD': new(KnowledgeDistillation(teacher))}
    if fasterai: fs |= {'fasterai SoftTarget': new(peer(teacher)), 'fasterai SoftTarget, teacher frozen': new(peer(teacher, frozen=True))}
    report(fs, rounds, ('KD','plain + teacher','1.05'), *[(o,'plain + teacher','') for o in fs if 'fasterai' in o])
    report({'plain': new(), 'KD, cache=True': new(KnowledgeDistillation(teacher, cache=True))}, rounds, ('KD, cache=True','plain','1.10'))

def resnet(*blocks):
    "A ResNet for small images"
    m = ResNet(BasicBlock, blocks, num_classes=10)
    m.conv1,m.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False),nn.Identity()
    return m

def resnets(rounds=9, bs=32):
    print(f'\nResNet-10 taught by ResNet-18, images 3 × 32 × 32, batch {bs}, medians of {rounds} steps')
    teacher,stages = resnet(2,2,2,2).eval(),[f'layer{i}' for i in (1,2,3,4)]
    def new(*args, **kwargs): return stepper(resnet(1,1,1,1), *args, shape=(3,32,32), bs=bs, **kwargs)
    def distil(terms=None, **kwargs): return new(KnowledgeDistillation(teacher, terms, .1, **kwargs))
    many = KD(T=4)*.9 + AT(stages)*1000 + SP(stages[-1])*3000 + VID(stages[-2:])*10
    fs = {'plain': new(), 'plain + teacher': new(teacher=teacher), 'KD': distil(), 'KD, cache=True': distil(cache=True),
          'KD + AT + SP + VID': distil(many), 'AT': distil(AT(stages)*1000)}
    if fasterai: fs |= {'fasterai SoftTarget': new(peer(teacher)), 'fasterai SoftTarget, teacher frozen': new(peer(teacher, frozen=True)),
                        'fasterai Attention, teacher frozen': new(peer(teacher, 'Attention', stages, True))}
    report(fs, rounds, ('KD','plain + teacher','1.05'), ('KD, cache=True','plain','1.10'), ('KD + AT + SP + VID','KD','1.35'),
           ('AT','plain + teacher',''), *[(o,'plain + teacher','') for o in fs if 'fasterai' in o])

class Largest(TorchDispatchMode):
    "Notes in `n` how many elements the largest tensor has that is made inside"
    n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        self.n = max(self.n, *(o.numel() for o in tree_leaves(out) if isinstance(o, Tensor)), 0)
        return out

def both_ways(loss, x, *args):
    "A function that computes `loss(x, *args)` and its gradient, and returns them"
    def f():
        x.grad = None
        l = loss(x, *args); l.backward()
        return l.detach(),x.grad
    return f

def compare(fast, slow, most, rounds):
    "Time and largest tensor of two functions that must agree"
    for a,b in zip(fast(), slow()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    with Largest() as f: fast()
    with Largest() as s: slow()
    ms = median_ms([fast, slow], rounds)
    print(f'{ms[0]:.0f} ms = 1/{ms[1]/ms[0]:.0f} of {ms[1]:.0f} ms, at most 1/{most} wanted; largest tensor {f.n:,} elements, not {s.n:,}')

def nst_broadcast(f_s, f_t):
    x,y = (unit(f.flatten(2), dim=2) for f in (f_s, f_t))
    def k(a, b): return (a[:,:,None]*b[:,None]).sum(-1).square().mean()
    return k(x, x) + k(y, y) - 2*k(x, y)

def crd_gathered(v, memory, index, others, Z, T=.07):
    def p(i): return torch.exp(torch.bmm(memory[i], v[:,:,None])[...,0]/T)/Z
    c = others.shape[1]/len(memory)
    return (torch.log1p(c/p(index[:,None])).sum() + torch.log1p(p(others)/c).sum())/len(v)

def losses(rounds=5, B=64, N=50_000, D=128, K=16384):
    print(f'\nLosses with their gradients, medians of {rounds} rounds')
    f_s,f_t = torch.randn(2, 64, 256, 8, 8)
    maps = f_s.requires_grad_(),f_t
    print('NST on (64, 256, 8, 8), pairs of channels broadcast: ', end='')
    compare(both_ways(nst, *maps), both_ways(nst_broadcast, *maps), 10, rounds)
    v,memory = unit(torch.randn(B, D)).requires_grad_(),unit(torch.randn(N, D))
    args = v,memory,torch.randint(N, (B,)),torch.randint(N, (B,K)),torch.tensor(float(N))
    print(f'CRD of {B} embeddings with {K:,} of {N:,} negatives, gathered: ', end='')
    compare(both_ways(crd, *args), both_ways(crd_gathered, *args), 5, rounds)

def habits():
    "What the callbacks do to validation and to their teacher"
    print()
    dls = from_arrays(torch.randint(0, 256, (640,1,28,28), dtype=torch.uint8), torch.arange(640)%10, device='cpu')
    for name,kd in [('kdnb',KnowledgeDistillation)] + [('fasterai',peer)]*bool(fasterai):
        learn,cb,calls = Learner(dls, lenet300()),kd(lenet5()),[]
        cb.teacher.register_forward_hook(lambda *_: calls.append(1))
        with learn.no_bar(), learn.no_logging():
            losses,runs = [learn.validate()[0],learn.validate(cbs=cb)[0]],len(calls)
            learn.fit(1, cbs=cb)
        print(f'{name}: the teacher runs {runs} times in validation, and the loss shown is {losses[1]:.3f} where the task loss is {losses[0]:.3f}; '
              f'after training {sum(p.grad is not None for p in cb.teacher.parameters())} of the teacher\'s parameters hold a gradient')

if __name__=='__main__':
    begin(f'fasterai {peer_version}' if fasterai else 'fasterai is not in bench/.peers and left out')
    mlps(); resnets(); losses(); habits()
