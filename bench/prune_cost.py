"What pruning costs and what it saves, beside the limits that are wanted; measured as in step_cost.py."
import io, sys, time

from step_cost import *

sys.path.append(str(Path(__file__).parent/'.peers'))
try: import onnx, onnxruntime
except ImportError: onnxruntime = None

SHAPE = (3,32,32)
def images(bs): return torch.randn(bs, *SHAPE, generator=torch.Generator().manual_seed(0))
def net(name, **kwargs): return create(name, in_shape=SHAPE, **kwargs)

def seconds(f, rounds=3):
    "Median processor seconds of `f()`"
    return median_ms([f], rounds)[0]/1e3

def steps(rounds=7):
    for stem in ('small','imagenet'):
        new = partial(net, 'resnet18', stem=stem)
        masked = new()
        prune_model(masked, .8)
        fs = dict(plain=stepper(new(), shape=SHAPE, bs=64), masked=stepper(masked, shape=SHAPE, bs=64))
        ms = dict(zip(fs, median_ms(list(fs.values()), rounds)))
        print(f'a step of resnet18 ({stem} stem, 3 × 32 × 32, batch 64) under masks: {ms["masked"]:.0f} ms = '
              f'{ms["masked"]/ms["plain"]:.2f} × plain ({ms["plain"]:.0f} ms), at most 1.05 wanted')

def scoring():
    model = net('resnet18')
    print(f'magnitude of {n_weights(model):,} weights: {seconds(lambda: scores(model)):.2f} s, and {seconds(lambda: select(scores(model), .8)):.2f} s '
          'with the choice of the least, at most .3 s wanted')
    dls = from_arrays(torch.randint(0, 256, (640,*SHAPE), dtype=torch.uint8), torch.arange(640)%10, bs=64, device='cpu')
    model = net('resnet20')
    def epoch():
        for x,y in dls.train:
            F.cross_entropy(model(x.as_subclass(Tensor)), y.as_subclass(Tensor)).backward()
            model.zero_grad()
    prue,plain = median_ms([lambda: scores(model, 'prue', dls), epoch], 5)
    print(f"PrUE's scores of resnet20 take {prue/plain:.2f} × forward and backward of an epoch, at most 2.2 wanted")

def halve(model, xb):
    "`model` under masks that switch off half of the channels of every group that can be removed"
    return prune_model(model, .5, data=xb, by='channel', scope='layer')

def shrinking(rounds=11):
    xb = images(2)
    for name,most in (('resnet18',2), ('densenet121',15)):
        masked = halve(net(name), xb)
        print(f'shrink {name}: {seconds(lambda: shrink(masked, xb), 1):.1f} s, at most {most} wanted')
    dense,xb = net('resnet18', stem='imagenet').eval(),images(64)
    small = shrink(halve(deepcopy(dense), xb), xb).eval()
    zeros = fold(prune_model(deepcopy(dense), .9)).eval()
    rows = {'eager': [lambda m=m: m(xb) for m in (dense,small,zeros)]}
    if onnxruntime: rows['onnxruntime'] = [session(m, xb) for m in (dense,small,zeros)]
    print(f'resnet18, 3 × 32 × 32, batch 64: {macs(dense, xb)[""]:,} MACs an image, {macs(small, xb)[""]:,} with half of its channels')
    for (name,fs),least in zip(rows.items(), (2.5,3.5)):
        with torch.no_grad(): d,s,z = median_ms(fs, rounds)
        print(f'{name:12} {d:.1f} ms; half of the channels removed {s:.1f} ms = {d/s:.1f} × as fast, at least {least} wanted; '
              f'90 % zeros left in place {d/z:.2f} ×')

def session(model, xb):
    "A function that runs `model` in onnxruntime on one thread, after a check of its answers"
    f = io.BytesIO()
    torch.onnx.export(model, (xb,), f, dynamo=True, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    run = onnxruntime.InferenceSession(f.getvalue(), options, providers=['CPUExecutionProvider'])
    feed = {run.get_inputs()[0].name: xb.numpy()}
    with torch.no_grad(): assert np.abs(run.run(None, feed)[0]-model(xb).numpy()).max() < 1e-4
    return lambda: run.run(None, feed)

if __name__=='__main__':
    begin(*([f'onnxruntime {onnxruntime.__version__}'] if onnxruntime else []))
    steps(), scoring(), shrinking()
