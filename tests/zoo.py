"""Networks that nobody here wrote: half of each group's channels go, and everything that a user does next is tried.

`python tests/zoo.py` writes a row a network to results/zoo.csv; rows that are there are skipped, so a run that was
killed goes on. `--part 3/10` takes the third tenth (drawn by hash), `--minutes 20` stops after 20 minutes,
`--only NAME…` runs these again, `--show` prints a table of what stays."""
import argparse
import csv
import hashlib
import logging
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

FILE = Path(__file__).parent.parent/'results'/'zoo.csv'
LARGE = 60e6          # parameters: a variant of the same code that is larger is not run
COLUMNS = ['network','size','params','groups','free','left','macs_left','exact','counted','trains','copies','saves',
           'exports','stays','failed','groups_s','shrink_s']
STEPS = ['exact','counted','trains','copies','saves','exports']

# Tiny variants of timm's families, and those on which much could go
TIMM = '''
efficientnet_b0 efficientnet_b0_gn test_efficientnet_gn test_efficientnet_evos efficientnetv2_rw_t tf_efficientnetv2_s
mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium mixnet_s hardcorenas_a lcnet_050 lcnetv2_small
ghostnet_100 ghostnetv2_100 ghostnetv3_100 repghostnet_050 rexnet_100 tinynet_e mnasnet_small fbnetc_100 spnasnet_100
test_resnet test_byobnet resnet26d seresnet18 ecaresnet26t resnetv2_50d_gn resnetv2_50x1_bit test_convnext convnext_atto
convnextv2_atto test_convnext2 test_convnext3 regnetx_002 regnety_002 regnetz_b16 resnext50_32x4d legacy_seresnet18
skresnet18 skresnext50_32x4d res2net50_26w_4s res2net50_14w_8s res2next50 resnest14d dla34 dla46x_c dpn48b densenet121
ese_vovnet19b_slim cspresnet50 cs3darknet_focus_s cspnext_tiny selecsls42 hgnetv2_b0 hrnet_w18_small inception_v3
xception41 nf_resnet26 test_nfnet eca_nfnet_l0 gernet_s mobileone_s0 repvgg_a0 resnet50_gn tresnet_m vgg11_bn
mobilevit_xxs mobilevitv2_050 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvit_b0
efficientvit_m0 fastvit_t8 fasternet_t0 starnet_s050 repvit_m0_9 shvit_s1 swiftformer_xs inception_next_atto
convmixer_768_32 test_mambaout poolformer_s12 test_vit test_vit2 test_vit3 vit_tiny_patch16_224 deit_tiny_patch16_224
deit_tiny_distilled_patch16_224 test_vit_relpos beit_base_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224 coat_tiny
crossvit_9_240 convit_tiny pit_ti_224 levit_128s xcit_nano_12_p16_224 tnt_s_patch16_224 visformer_tiny
gmlp_ti16_224 mixer_s32_224 resmlp_12_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224
twins_svt_small pvt_v2_b0 mvitv2_tiny nest_tiny davit_tiny gcvit_xxtiny focalnet_tiny_srf tiny_vit_5m_224 test_maxvit
test_coatnet maxvit_rmlp_pico_rw_256 nextvit_small hiera_tiny_224 halonet26t botnet26t_256 lambda_resnet26t
sequencer2d_s volo_d1_224 csatv2 iformer_t'''.split()

# Networks on which others removed more, or nothing exactly: these are run first
FIRST = '''efficientnetv2_s efficientnetv2_rw_t tf_efficientnetv2_s ghostnetv2_100 ghostnet_100 ghostnetv3_100 mobilenetv4_hybrid_medium regnetx_002
regnety_002 resnext50_32x4d dla46x_c fastvit_t8 efficientnet_b0_gn resnetv2_50d_gn resnetv2_50x1_bit convnextv2_atto skresnet18 mixnet_s
res2net50_26w_4s res2net50_14w_8s test_maxvit mobilevitv2_050 test_nfnet eca_nfnet_l0 vit_tiny_patch16_224 test_vit test_vit_relpos
swin_tiny_patch4_window7_224'''.split()

def networks():
    "Names of all networks: torchvision's classification, three segmentation, one video; timm's where it is installed"
    from torchvision import models as tv
    names = [f'torchvision/{n}' for n in tv.list_models(module=tv)]
    names += [f'segmentation/{n}' for n in ('deeplabv3_mobilenet_v3_large','fcn_resnet50','lraspp_mobilenet_v3_large')]
    names += ['video/r3d_18']
    try: import timm
    except ImportError: return names
    return names+[f'timm/{n}' for n in TIMM if timm.is_model(n)]

def built(name):
    "The network called `name`, with random weights and 10 classes"
    kind,_,n = name.partition('/')
    torch.manual_seed(0)
    if kind=='timm':
        import timm
        return timm.create_model(n, num_classes=10)
    from torchvision import models as tv
    if kind=='segmentation': return tv.get_model(n, weights=None, weights_backbone=None, num_classes=10)
    if kind=='video': return tv.get_model(n, weights=None, num_classes=10)
    kwargs = dict(init_weights=True) if n in ('googlenet','inception_v3') else {}
    return tv.get_model(n, weights=None, num_classes=10, **kwargs)

def sizes(name, model):
    "Sides of images to try, the smallest first"
    config = getattr(model, 'default_cfg', None) or getattr(model, 'pretrained_cfg', None) or {}
    usual = config.get('input_size', (3,224,224))[-1]
    fixed = config.get('fixed_input_size') or hasattr(model, 'image_size')
    return [usual] if fixed else sorted({64,96,128,192,usual,299})     # Inception's side heads need 299

@torch.no_grad()
def batch(name, model, n=2):
    "Images for `model`, of the smallest side with which it runs in evaluation and in training"
    for side in sizes(name, model):
        x = torch.randn(n, 3, *([4] if name.startswith('video') else []), side, side, generator=torch.Generator().manual_seed(1))
        other = deepcopy(model)
        try: other.eval()(x); other.train()(x); return x
        except Exception as e: fault = e
    raise fault

def half(g):
    "The first half of the channels of group `g`, and of each of its blocks"
    blocks = torch.zeros(g.n, dtype=torch.long) if g.blocks is None else g.blocks
    dead = torch.zeros(g.n, dtype=torch.bool)
    for b in blocks.unique():
        mine = (blocks==b).nonzero()[:,0]
        dead[mine[:len(mine)//2]] = True
    return dead

def counted_macs(model, x):
    "Multiply-accumulates of convolutions and linear layers for one sample, counted by hooks from the shapes that pass"
    total,hooks = Counter(),[]
    def count(m, xs, out):
        if isinstance(m, nn.Linear): total[''] += out.numel()*m.in_features
        elif m.transposed: total[''] += xs[0].numel()*m.weight[0].numel()
        else: total[''] += out.numel()*m.weight[0].numel()
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)): hooks.append(m.register_forward_hook(count))
    try:
        with torch.no_grad(): model.eval()(x[:1])
    finally:
        for h in hooks: h.remove()
    return total['']

def counts_agree(model, x):
    "Does `macs` count for convolutions and linear layers what hooks count?"
    from kdnb.all import macs
    layers = {p for p,m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    return sum(v for p,v in macs(model, x).items() if p in layers)==counted_macs(model, x)

def loss_of(out):
    "A loss of whatever a network returns"
    return sum(o.float().square().mean() for o in tree_leaves(out))

def trains(model, x):
    "One step of SGD: every parameter is finite, and some move"
    before = [p.detach().clone() for p in model.parameters()]
    opt = torch.optim.SGD(model.parameters(), 1e-3)
    loss_of(model.train()(x)).backward()
    opt.step()
    after = list(model.parameters())
    return all(p.isfinite().all() for p in after) and any(not torch.equal(a, b) for a,b in zip(before, after))

@torch.no_grad()
def same(a, b, x):
    "Do two networks give the same numbers?"
    def run(m):
        torch.manual_seed(0)
        return tree_leaves(m.eval()(x))
    return all(torch.equal(p, q) for p,q in zip(run(a), run(b), strict=True))

def exact(small, masked, x):
    "Are they equal in float64? A weight that became a plain one was rounded to float32: then they are shrunk in float64"
    from kdnb.all import max_difference, shrink
    if max_difference(small, masked, x)<1e-10: return True
    wide,x = deepcopy(masked).double(),x.double()
    return max_difference(shrink(wide, x), wide, x)<1e-10

def reloaded(small, name, folder):
    "`small`, saved and loaded again"
    from kdnb.all import load_model, save_model
    save_model(small, folder/'small.safetensors', arch=dict(name=name, kwargs={}))
    return load_model(folder/'small.safetensors', lambda: built(name))

def exported(small, masked, x, folder):
    "`small`, and the whole network under masks, as ONNX: `to_onnx` compares each file with its network in onnxruntime"
    from kdnb.all import mask_model, prunable, to_onnx
    dark = deepcopy(masked)
    mask_model(dark, {k: w!=0 for k,w in prunable(dark).items()})
    return all(bool(to_onnx(m, x, folder/f'{n}.onnx')) for n,m in dict(small=small, masked=dark).items())

@contextmanager
def quiet():
    "Warnings and logs of libraries are not ours"
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally: logging.disable(level)

def line(e): return re.sub(r'0x[0-9a-f]+', '0x', (str(e).splitlines() or [''])[0])[:100] or type(e).__name__

def row(name, steps=STEPS):
    "What becomes of the network `name`: a row of `COLUMNS`; `steps` of them are tried"
    from kdnb.all import channel_groups, macs, n_params, shrink
    res = dict.fromkeys(COLUMNS, '') | dict(network=name)
    def step(what, f):
        if what not in steps: return
        try: res[what] = {True: 'yes', False: 'no'}.get(f(), 'yes')
        except Exception as e: res[what],res['failed'] = 'no',res['failed'] or f'{what}: {line(e)}'
    with quiet(), tempfile.TemporaryDirectory() as folder:
        try:
            model = built(name).eval()
            res['params'] = n_params(model)
            if res['params']>LARGE: return res | dict(failed=f'more than {LARGE/1e6:.0f} million parameters: not run')
            x = batch(name, model)
            res['size'],start = x.shape[-1],time.thread_time()
            groups = channel_groups(model, x)
            res['groups_s'] = round(time.thread_time()-start, 1)
            free = [g for g in groups if not g.stays]
            why = Counter()
            for g in groups:
                if g.stays: why[re.sub(r'\b[\w.]*\.[\w.]*\b', '…', g.stays)] += g.n
            res |= dict(groups=len(groups), free=len(free), stays='; '.join(f'{n} {w}' for w,n in why.most_common(3)))
            masked = deepcopy(model)
            with torch.no_grad():
                for g in free:
                    for key,there in g.traces(model, half(g)): masked.get_parameter(key).masked_fill_(there, 0)
            start = time.thread_time()
            small = shrink(masked, x)
            res['shrink_s'] = round(time.thread_time()-start, 1)
            res |= dict(left=f'{n_params(small)/n_params(model):.3f}', macs_left=f'{macs(small, x)[""]/macs(model, x)[""]:.3f}')
        except Exception as e: return res | dict(failed=line(e))
        step('exact', lambda: exact(small, masked, x))
        step('counted', lambda: counts_agree(small, x))
        step('trains', lambda: trains(deepcopy(small), x))
        step('copies', lambda: same(deepcopy(small), small, x))
        step('saves', lambda: same(reloaded(small, name, Path(folder)), small, x))
        step('exports', lambda: exported(small, masked, x, Path(folder)))
    return res

def tenth(name, k, of=10):
    "Is `name` in the `k`th of so many parts, drawn by hash?"
    return int(hashlib.md5(name.encode()).hexdigest(), 16)%of==(k-1)%of

def rows(path=FILE):
    "The rows that are there"
    if not path.exists(): return []
    with path.open(newline='') as f: return list(csv.DictReader(f))

def write(found, path=FILE):
    "All rows, in the order of the networks"
    order = {n: i for i,n in enumerate(networks())}
    new = path.with_suffix('.new')
    with new.open('w', newline='') as f:
        w = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        w.writeheader()
        w.writerows(sorted(found, key=lambda r: (order.get(r['network'], len(order)), r['network'])))
    new.replace(path)

class Late(Exception): "A network takes too long"

@contextmanager
def within(seconds):
    "Raise `Late` when this process has run for `seconds`, whatever else the machine does"
    def late(*args): raise Late(f'not done in {seconds} s')
    old = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)

def main():
    "Run what has no row yet"
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--minutes', type=float, default=1e9, help='stop beginning networks after so many')
    p.add_argument('--part', default='1/1', help='k/n: the kth of n parts')
    p.add_argument('--only', nargs='*', help='names, or what they begin with; run again')
    p.add_argument('--seconds', type=int, default=300, help='of one core for a network, at most')
    p.add_argument('--out', type=Path, default=FILE)
    p.add_argument('--show', action='store_true', help='print the rows and run nothing')
    p.add_argument('--steps', nargs='*', default=STEPS, choices=STEPS)
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.show:
        for r in rows(a.out): print(*(r[c] or '-' for c in COLUMNS), sep='\t')
        return
    k,of = map(int, a.part.split('/'))
    end,there = time.monotonic()+60*a.minutes,{r['network'] for r in rows(a.out)}
    for name in sorted(networks(), key=lambda n: n.partition('/')[2] not in FIRST):
        if a.only is not None and not any(name.partition('/')[2].startswith(o) or name==o for o in a.only): continue
        if a.only is None and name in there or not tenth(name, k, of): continue
        if time.monotonic()>end: break
        try:
            with within(a.seconds): r = row(name, a.steps)
        except Late as e: r = dict.fromkeys(COLUMNS, '') | dict(network=name, failed=str(e))
        write([o for o in rows(a.out) if o['network']!=name]+[r], a.out)
        print(*(r[c] or '-' for c in COLUMNS), sep='  ', flush=True)

if __name__=='__main__':
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
