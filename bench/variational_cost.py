"What variational noise costs in a training step, in time and memory, and what the shrunken network saves; beside the limits that are wanted."
import re, subprocess, sys

from step_cost import *
from prune_cost import onnxruntime, session

NETS = {'lenet300': dict(shape=(1,28,28), bs=256, groups='neurons', rounds=101), 'lenet5': dict(shape=(1,28,28), bs=256, groups='channels', rounds=41),
        'resnet20': dict(shape=(3,32,32), bs=128, groups='channels', rounds=7)}
WANTED = dict(group=1.15, full=3.)

def step(name, noise, opt_func=Adam):
    "A step of the network, plain if `noise` is None"
    o = NETS[name]
    model,xb = create(name, in_shape=o['shape']),torch.randn(2, *o['shape'])
    if noise: model = to_variational(model, xb, o['groups'], noise)
    return stepper(model, VariationalSparsifier() if noise else (), opt_func=opt_func, shape=o['shape'], bs=o['bs'])

def times():
    for name,o in NETS.items():
        for opt_func in (Adam, fused_adam):
            fs = {noise: step(name, noise, opt_func) for noise in (None,'group','full')}
            ms = dict(zip(fs, median_ms(list(fs.values()), o['rounds'])))
            for noise,most in WANTED.items():
                print(f'{name:9} {opt_func.__name__:10} noise={noise!r:8} {ms[noise]:8.2f} ms = {ms[noise]/ms[None]:.2f} × plain ({ms[None]:.2f} ms), at most {most} wanted')

def grown(name, noise):
    "MB by which the peak of this process grows when the network takes three steps (Linux)"
    def mb(field): return int(re.search(rf'{field}:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024
    f = step(name, noise)
    Path('/proc/self/clear_refs').write_text('5')       # the peak counts from here
    before = mb('VmRSS')
    for _ in range(3): f()
    return mb('VmHWM')-before

def memory():
    def ask(noise): return float(subprocess.run([sys.executable, __file__, 'resnet20', noise], capture_output=True, text=True, check=True).stdout.split()[-1])
    plain,group,full = ask(''),ask('group'),ask('full')
    print(f"memory of a step of resnet20, batch 128: plain {plain:.0f} MB, 'group' {group/plain:.2f} ×, 'full' {full/plain:.2f} ×, at most 2.5 wanted")

def deployed():
    "LeNet-300-100 cut to at most 3 % of its weights"
    dense,x = lenet300().eval(),torch.randn(256,1,28,28)
    v = to_variational(dense)
    with torch.no_grad():
        for g,n in zip(noise_groups(v).values(), (97,65,22)): g.gamma_logvar[torch.randperm(g.n)[n:]] = 9.
    small = shrink(to_deterministic(v, 0.), x).eval()
    fs = {'eager': [partial(m, x) for m in (dense,small)]} | ({'onnxruntime': [session(m, x) for m in (dense,small)]} if onnxruntime else {})
    for name,pair in fs.items():
        with torch.no_grad(): d,s = median_ms(pair, 201)
        print(f'lenet300 with {n_weights(small)/n_weights(dense):.1%} of its weights, batch 256, {name}: {d:.3f} → {s:.3f} ms = {d/s:.1f} × as fast'
              + (', at least 8 wanted' if name=='onnxruntime' else ''))

if __name__=='__main__':
    if len(sys.argv)>1: torch.set_num_threads(1); print(grown(sys.argv[1], sys.argv[2] or None))
    else: begin(), times(), memory(), deployed()
