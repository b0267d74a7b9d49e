"""The small networks in models/: trained, saved and measured again. Settings are those of variational.py, chosen there on the
validation split; one seed each, nothing chosen by test accuracy. Give names to make only these; a run that was cut off goes on."""
import json, os, sys, warnings
from functools import partial
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'
from kdnb.all import *
from kdnb.training.schedules import *
from variational import ACCURATE, BASE, CAFFE, GATES, SHIFT, TEACHER

HERE = Path(__file__).parent
MODELS,RUNS = HERE.parent/'models',HERE/'.cache'/'models'
# LeNet-5-Caffe: of 16, 20 and 26 for `singles`, 30 and 60 epochs of it, and 40 and 100 of tuning, none differs on the validation split
NETWORKS = {
    'mnist_lenet300': BASE | SHIFT | dict(data='mnist', seed=0, gamma_weight=700., singles=40.),
    'fashion_mnist_lenet300': BASE | ACCURATE | dict(data='fashion_mnist', seed=0, gamma_weight=800., singles=25., tune=40),
    'mnist_lenet5_caffe': BASE | CAFFE | dict(data='mnist', seed=1, gamma_weight=dict(zip(GATES, (21000.,8000.,500.,1500.))),
                                              singles=26., singles_epochs=30, tune=40)}

def data(o, **kwargs):
    warnings.filterwarnings('ignore', category=FutureWarning)
    return image_dls(o['data'], valid_pct=1/12, device='cpu', **kwargs)

def small(model, dls): return shrink(to_deterministic(model), dls)

def masked(model):
    "`model`, its zeros held by masks"
    mask_model(model, {k: w!=0 for k,w in prunable(model).items()})
    return model

def make(name):
    "Teacher, student, its groups, its single weights, tuning: stages of a run; the small network and its report go to `models/`"
    o,path = NETWORKS[name],MODELS/f'{name}.safetensors'
    dls = data(o, bs=o['bs'], pad=int(o['shift']))
    settings = {k: v for k,v in o.items() if k not in ('data','seed')}
    run = Run(RUNS/name, 'small-network', dls, o['data'], (o['seed'],), show=False, **settings)
    shown = data(o, bs=256, pad=int(o['data']=='mnist'))      # what the teacher learns from
    teacher = run.fit('teacher', run.learner(run.network(o['teacher']), dls=shown, wd=0.), TEACHER[o['teacher']], 3e-3)
    def taught(): return KnowledgeDistillation(teacher, KD(T=o['T'])*o['lam'], task=1-o['lam'], cache=True, n_views=9 if o['shift'] else None)
    def stage(title, model, n_epoch, pct_start, cbs=(), **kwargs):
        return run.fit(title, run.learner(model, wd=0.), n_epoch, o['lr'], 'fit_flat_cos', cbs=[taught(), *cbs], pct_start=pct_start, **kwargs)
    prior,cut = partial(VariationalSparsifier, 1-o['lam']),partial(small, dls=dls)
    dense = stage('student', run.network(o['student']), o['epochs'][0], .75)
    groups = prior(**{k: o[k] for k in ('gamma_weight','theta_weight','warmup','cooldown','gamma_lr')})
    model = stage('groups', to_variational(dense, dls, o['groups']), o['epochs'][1], o['pct_start'], [groups], of=dense, result=cut)
    singles = prior(gamma_weight=o['singles'])
    model = stage('weights', to_variational(model, dls, 'weights'), o['singles_epochs'], .75, [singles], of=dense, result=cut)
    model = stage('tuned', masked(deepcopy(model)), o['tune'], .2, of=dense, result=fold)
    run.finish(model, of=dense)
    MODELS.mkdir(exist_ok=True)
    save_model(model, path, dls)
    keys = 'name','epochs','test_accuracy','valid_accuracy','weights','weights_kept','params','macs','bytes','seconds'
    report = dict(network=name, data=o['data'], seed=o['seed'], settings=settings, file_bytes=path.stat().st_size, versions=run.versions,
                  stages=[{k: s[k] for k in keys if k in s} for s in run.stages])
    path.with_suffix('.json').write_text(json.dumps(report, indent=1)+'\n')
    print(name, run, sep='\n', flush=True)

def readme():
    "`models/README.md`: a table of the reports, and the lines that load a network"
    reports = [json.loads(o.read_text()) for o in sorted(MODELS.glob('*.json'))]
    lines = ['# Small networks', '', 'Made by `results/models.py` (VBGS-KD, Ming et al. 2020: groups, then single weights, then tuned); '
             'beside each its report. Test accuracy after the last epoch, one seed; settings were chosen on a validation split.', '',
             '| network | data | seed | test accuracy (%) | weights | of the dense network (%) | MACs | bytes of the file |', '|---|---|---|---|---|---|---|---|']
    for r in reports:
        o = r['stages'][-1]
        lines.append(f"| `{r['network']}` | {r['data']} | {r['seed']} | {100*o['test_accuracy']:.2f} | {o['weights']:,} | "
                     f"{100*o['weights_kept']:.2f} | {o['macs']:,.0f} | {r['file_bytes']:,} |")
    (MODELS/'README.md').write_text('\n'.join([*lines, '', *LOAD, '']))

LOAD = ['```python', 'from kdnb.all import *', "model = load_model('models/mnist_lenet300.safetensors')",
        "accuracy_on(model, image_dls('mnist', device='cpu').test)", '```']

def main(names=()): # Of networks; 'readme' alone writes the table
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for name in names or NETWORKS:
        if name!='readme': make(name)
    readme()

if __name__=='__main__': main(sys.argv[1:])
