"A record that no run has written: every kind of exhibit, several seeds, as large as wanted."
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

def stages(rng, n_seeds=3, n_more=0, n_epoch=30):
    "Teacher, student, sparse and small, and `n_more` others"
    names = [('teacher', .981, 61_470, 281_640, 251_896, 2.31), ('student', .972, 266_200, 266_200, 1_068_840, .82),
             ('sparse', .968, 9_914, 266_200, 1_068_840, .81), ('small', .968, 9_800, 9_800, 41_200, .12),
             *((f'KD from pruned .{i:02}', .95+.02*rng.random(), 30_000+i, 30_000, 120_000, .4) for i in range(n_more))]
    def curves(acc):
        t = np.linspace(0, 1, n_epoch)
        acc = acc - .5*np.exp(-6*t) + .004*rng.normal(size=n_epoch)
        return [dict(train_loss=1.5*(1-a)+.1, valid_loss=2*(1-a)+.12, accuracy=a) for a in acc.tolist()]
    return [dict(name=n, seed=s, test_accuracy=a+.002*rng.normal(), valid_accuracy=a, weights=int(w), weights_kept=w/266_200,
                 params=w+300, macs=m, bytes=b, latency_ms=ms, epochs=n_epoch, seconds=12.5, agreement=.95+.01*s, curves=curves(a))
            for s in range(n_seeds) for n,a,w,m,b,ms in names]

def layers(rng):
    def rows(dims): return [dict(path=f'fc{i+1}', kind='Linear', shape=f'{b}×{a}', weights=a*b, params=a*b+b, macs=a*b, bytes=4*(a*b+b))
                            for i,(a,b) in enumerate(zip(dims, dims[1:]))]
    return dict(before=rows((784,300,100,10)), after=rows((310,24,18,10)))

def exhibits(rng, big=1):
    def curve(base): return pd.DataFrame([dict(sparsity=s, weights=round(266_200*(1-s)), accuracy=base-.5*max(0, s-.8)**1.5-.002*rng.random(), repeat=r)
                                          for s in np.arange(0, 1, .1) for r in range(3)])
    n,c = 300*big,10
    groups = {f'fc{i+1}': np.vstack([np.concatenate([rng.normal(-4, .7, k), rng.normal(-3+6*t, .5, m-k)]) for t in np.linspace(0, 1, 40*big)])
              for i,(k,m) in enumerate([(60,784),(40,300),(30,100)])}
    def cut(h, w): return rng.normal(size=(h,w))*(rng.random((h,1))<.4)*(rng.random((1,w))<.5)
    y = rng.integers(0, c, n)
    around = rng.normal(size=(c,2))*10
    found = dict(
        table=pd.DataFrame({'no teacher': [.9312,.9201], 'unpruned': [.9415,np.nan], 'pruned': [.9502,.9419]}, index=['ResNet-20','ResNet-8']),
        curve={'teacher': curve(.98), 'student': curve(.96)},
        scatter=pd.DataFrame(dict(x=rng.random(40), y=90+5*rng.random(40), label=rng.choice(['plain','smooth','PrUE'], 40))),
        lines={k: pd.DataFrame(dict(x=range(1, 9), y=np.sqrt(range(1, 9))+i, err=.1)) for i,k in enumerate(('VID','KD','AT'))},
        log_alpha=dict(groups=groups, threshold=0.),
        weights={'fc1': cut(300,784), 'fc2': cut(100,300), 'fc3': cut(10,100)} | {f'more{i}': cut(512,512) for i in range(big-1)},
        embedding=pd.DataFrame([dict(panel=p, x=x, y=yy, label=k) for p in ('none','magnitude','PrUE')
                                for (x,yy),k in zip(around[y]+rng.normal(size=(n,2)), y)]),
        maps={'image': rng.normal(size=(4,3,28,28)), 'fc1': rng.normal(size=(4,14,14)), 'fc2': rng.normal(size=(4,7,7))})
    labels = dict(scatter=dict(x='uncertainty (10⁻²)', y='student accuracy (%)'), lines=dict(x='samples per class', y='accuracy (%)'))
    titles = dict(table='Table 12: students of their own', curve='Accuracy against what is left', scatter='Uncertainty and the student',
                  lines='Few samples', log_alpha='Signal and noise', weights='What was cut', embedding='What the teachers see', maps='Where it looks')
    return {k: SimpleNamespace(name=k, kind=k, title=titles[k], data=v, labels=labels.get(k, {}),
                               text=f'Made-up numbers of the kind {k}: a sentence that says what is seen, such as a correlation of .81, and what is not.')
            for k,v in found.items()}

def fake_record(path='runs/fake', big=1, n_seeds=3, n_more=0, **kwargs):
    rng = np.random.default_rng(0)
    return SimpleNamespace(**dict(
        path=Path(path), recipe='vbgs-kd', data='mnist', seeds=tuple(range(n_seeds)), has_test=True, n_test=10_000, verdict=None, loads=True, in_shape=[1,28,28], bs=256,
        settings=dict(epochs=[20,20,80], lam=.9, T=4., gamma_weight=400., quick=False), versions=dict(torch='2.14.1', kdnb='0.1.0'),
        machine=dict(system='Linux', processor='x86_64', threads=1, device='cpu'),
        stages=stages(rng, n_seeds, n_more, 30*big), exhibits=exhibits(rng, big), layers=layers(rng)) | kwargs)
