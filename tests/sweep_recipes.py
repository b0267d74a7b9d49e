"Recipes that need no training, for the tests of sweeps; they write down what they do beside their folders."
import json, os, time
from pathlib import Path
from types import SimpleNamespace

steady_defaults = dict(lam=.5, steps=4, pause=.05, weights=1, lives=0)

def _say(path, *words):
    with open(path.parent/'log.txt', 'a') as f: f.write(' '.join(map(str, (path.name, *words)))+'\n')

def steady(dls, teacher='a', student='b', path='runs/steady', epochs=None, seeds=1, data='user data', quick=False, force=False, show=True,
           **settings):
    "Go `steps` steps, one file each, and go on where the folder stands"
    s,path = steady_defaults|settings,Path(path)
    path.mkdir(parents=True, exist_ok=True)
    done = path/'steps'
    done.touch()
    at = done.stat().st_size
    _say(path, 'begin', at, os.getpid())
    if s['lam']<0: raise ValueError(f'lam is {s["lam"]}, expected a fraction.')
    if s['lam']>1:
        saved = len([*path.glob('*.safetensors')])
        if s['lives']: (path/f'{saved}.safetensors').touch()
        if not s['lives'] or saved<s['lives']: os.kill(os.getpid(), 9)
    for i in range(at, s['steps']):
        time.sleep(s['pause'])
        with open(done, 'a') as f: f.write('.')
        _say(path, 'step', i)
    _say(path, 'end', os.getpid())
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    return SimpleNamespace(stages=[dict(name=n, seed=o, test_accuracy=s['lam']/(1+i)+o/100, weights=1000*(2-i), macs=10., epochs=3, curves=[])
                                   for o in seeds for i,n in enumerate(('big','small'))])
