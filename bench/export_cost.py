"What leaves the house: how fast a shrunken resnet18 in eight bits is beside the dense one, how small, and how fast a file is loaded."
import sys, tempfile

from prune_cost import halve, images, net
from step_cost import *
from kdnb.export.speed import _one_thread

def loader(n=512):
    "Random images; their classes are no matter here"
    x = torch.randint(0, 256, (n,3,32,32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return from_arrays(x, torch.arange(n)%10, bs=64, device='cpu')

def forms(rounds=21):
    xb,dls = images(64),loader()
    dense = net('resnet18', stem='imagenet').eval()
    small = shrink(halve(deepcopy(dense), xb), xb).eval()
    with tempfile.TemporaryDirectory() as d:
        files = {k: to_onnx(m, dls, f'{d}/{i}.onnx', **kw) for i,(k,m,kw) in enumerate((
            ('dense, onnxruntime', dense, {}), ('half the channels, onnxruntime', small, {}),
            ('dense, int8', dense, dict(int8=True, max_drop=1)), ('half the channels, int8', small, dict(int8=True, max_drop=1))))}
        nets = {k: OnnxNetwork(o.path) for k,o in files.items()}
        runs = {'dense, eager': lambda: dense(xb), 'half the channels, eager': lambda: small(xb)}
        runs |= {k: lambda o=o, feed=o.feed(xb): o.session.run(None, feed) for k,o in nets.items()}
        with _one_thread(): ms = dict(zip(runs, median_ms(list(runs.values()), rounds)))
    eager = ms['dense, eager']
    print(f'resnet18 (imagenet stem, 3 × 32 × 32), a batch of 64, {rounds} rounds in turn')
    for k,v in ms.items():
        size = f', {files[k].bytes:,} bytes = {files[k].bytes/n_bytes(dense):.3f} × the dense parameters' if k in files else ''
        print(f'{k:32} {v:5.1f} ms ± {v.spread:.1f} = {eager/v:.1f} × dense eager{size}')
    k = 'half the channels, int8'
    print(f'wanted: {eager/ms[k]:.1f} × ≥ 8, {files[k].bytes/n_bytes(dense):.3f} ≤ .1')

def loading(rounds=11):
    with tempfile.TemporaryDirectory() as d:
        for name in ('resnet18','resnet50'):
            path = save_model(net(name), f'{d}/{name}.safetensors')
            print(f'load_model of {name} ({path.stat().st_size:,} bytes): {median_ms([lambda: load_model(path)], rounds)[0]:.0f} ms'
                  f'{", at most 100 wanted" if name=="resnet18" else ""}')

if __name__=='__main__':
    begin()
    forms(), loading()
