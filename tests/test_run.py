"The recipe and the command line, end to end on digits."
import json, subprocess, sys

import pytest
from common import data, quiet
from kdnb.all import *
from kdnb.cli import main

DEMO = ['compress','--data','digits','--bs','128','--epochs','6,6,30','--set','gamma_weight=40','--quiet','--out']

@pytest.fixture(scope='session')
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo')/'run'
    assert main([*DEMO, str(out)])==0
    return out

def test_what_is_written(demo):
    s = json.loads((demo/'summary.json').read_text())
    assert list(s)==['recipe','data','seed','seeds','versions','stages'] and s['recipe']=='vbgs-kd' and s['data']=='digits'
    assert [o['name'] for o in s['stages']]==['teacher','student','sparse','small']
    assert all(set(o)=={'name','seed','test_accuracy','weights','weights_kept','macs','bytes','latency_ms'} for o in s['stages'])
    student,sparse,small = s['stages'][1:]
    assert small['weights_kept']<.25 and small['test_accuracy']>student['test_accuracy']-.03
    assert small['weights']==small['macs'] and small['weights_kept']==small['weights']/student['weights']
    assert {'report.html','model.safetensors','summary.json','run.json','stages'}<={o.name for o in demo.iterdir()}

def test_the_saved_network_is_the_measured_one(demo):
    s,dls = json.loads((demo/'summary.json').read_text()),image_dls('digits')
    m = load_model(demo/'model.safetensors')
    assert accuracy_on(m, dls.test)==s['stages'][-1]['test_accuracy'] and n_weights(m)==s['stages'][-1]['weights']
    assert not any(type(o).__module__.startswith('kdnb') for o in m.modules())

def test_the_log_alphas_shown_are_those_that_were_cut(demo):
    assert all(o.dtype=='float32' for o in Record(demo).exhibits['log_alpha'].data['groups'].values())

def test_a_folder_is_taken_up_or_left_alone(demo, capsys, tmp_path):
    before = {f: f.read_bytes() for f in (demo/'stages').iterdir()}
    assert main([*DEMO, str(demo)])==0       # nothing is trained again
    assert {f: f.read_bytes() for f in (demo/'stages').iterdir()}==before
    (tmp_path/'thesis.txt').touch()
    assert main(['compress','--out',str(tmp_path),'--force','--quiet'])==1
    assert 'not the folder of a run' in capsys.readouterr().err and (tmp_path/'thesis.txt').exists()

def test_data_that_says_which_sample_is_which(tmp_path):
    a,b = (vbgs_kd(image_dls('digits', index=i, n_per_class=20), path=tmp_path/str(i), epochs=(1,1,2), show=False).models['sparse'] for i in (False,True))
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))

@pytest.mark.long
def test_the_same_seed_gives_the_same_network(tmp_path):
    dls = image_dls('digits', n_per_class=20)
    a,b,c = (vbgs_kd(dls, path=tmp_path/str(i), epochs=(2,2,10), seeds=(s,), show=False).models['sparse'] for i,s in enumerate((0,0,1)))
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.fc1.weight, c.fc1.weight)

def test_a_trained_learner_as_teacher_and_modules_of_one_s_own(tmp_path):
    dls = image_dls('digits', n_per_class=50)
    teacher = Learner(dls, create('lenet300', dls), metrics=accuracy)
    quiet(teacher, 5, 3e-3, fit='fit_one_cycle')
    before = deepcopy(teacher.model.state_dict())
    student = nn.Sequential(nn.Flatten(), nn.Linear(64,30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30,10))
    student.arch = dict(name='mine', kwargs={})
    run = vbgs_kd(dls, teacher, student, tmp_path/'run', epochs=(1,3,20), gamma_weight=20., show=False)
    assert all(torch.equal(v, before[k]) for k,v in teacher.model.state_dict().items())
    assert n_weights(run.models['small'])<n_weights(student) and max_difference(run.models['small'], run.models['sparse'], dls)<=1e-5
    build = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30,10))
    assert accuracy_on(load_model(run.path/'model.safetensors', build), dls.test)==run.stages[-1]['test_accuracy']

def test_a_student_without_groups(tmp_path):
    dls = image_dls('digits')
    conv = nn.Sequential(nn.Conv2d(1,10,8), nn.Flatten())
    with pytest.raises(ValueError, match='there is nothing to group'): vbgs_kd(dls, 'lenet300', conv, tmp_path/'run', epochs=(1,1,1), show=False)
    assert not (tmp_path/'run').exists()          # said before anything is trained

def test_a_nan_stops_the_run_and_the_last_good_weights_stay(tmp_path):
    dls = image_dls('digits')
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) in epoch \d+, batch \d+ of training 'teacher'"):
        vbgs_kd(dls, path=tmp_path/'run', epochs=(3,1,1), teacher_lr=1e30, show=False)
    assert json.loads((tmp_path/'run'/'run.json').read_text())['stages']==[]

def test_help_is_quick_and_mistakes_are_sentences(capsys):
    for argv,says in [(['compress','--epochs','a,b'], 'commas between'), (['compress','--recipe','magic'], 'invalid choice'), ([], 'COMMAND')]:
        with pytest.raises(SystemExit): main(argv)
        assert says in capsys.readouterr().err
    code = "import sys; from kdnb.cli import main\ntry: main(['compress','--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)

@pytest.mark.long
@pytest.mark.mnist
def test_mnist_is_within_reach(data_dir, tmp_path):
    "The real thing: a few epochs on 3,000 MNIST images already remove most of the student, which is no worse for it"
    dls = image_dls('mnist', bs=128, n_per_class=300)
    run = vbgs_kd(dls, path=tmp_path/'run', epochs=(3,3,15), lr=3e-3, show=False)
    stages = {o['name']: o for o in run.stages}
    assert stages['small']['weights_kept']<.35 and stages['small']['test_accuracy']>max(.88, stages['student']['test_accuracy'])
    assert stages['small']['test_accuracy']==stages['sparse']['test_accuracy']

@pytest.mark.long
def test_single_weights_last(tmp_path):
    dls = image_dls('digits', n_per_class=40)
    with pytest.raises(ValueError, match='single_weights is -1'): vbgs_kd(dls, path=tmp_path/'run', single_weights=-1, show=False)
    assert not (tmp_path/'run').exists()
    run = vbgs_kd(dls, 'lenet300', path=tmp_path/'run', epochs=(2,2,20), gamma_weight=10., single_weights=20., show=False)
    small,thin = run.models['small'],run.models['thin']
    assert n_weights(thin, nonzero=True)<.7*n_weights(small) and n_weights(thin)<=n_weights(small)
    assert not any('kdnb' in type(m).__module__ for m in thin.modules())
    assert accuracy_on(load_model(run.path/'model.safetensors'), dls.test)==run.stages[-1]['test_accuracy']
    again = vbgs_kd(dls, 'lenet300', path=tmp_path/'run', epochs=(2,2,20), gamma_weight=10., single_weights=20., show=False)
    assert all(torch.equal(a, b) for a,b in zip(thin.parameters(), again.models['thin'].parameters(), strict=True))
    assert run.stages==again.stages

def test_any_fastai_data_without_a_test_set(tmp_path):
    x,y = image_dls('digits').test.dataset[torch.arange(359)]
    items = [(TensorImage(a.float()/255),TensorCategory(b)) for a,b in zip(x, y)]
    dls = DataLoaders(TfmdDL(items[:300], bs=32, shuffle=True, num_workers=0), TfmdDL(items[300:], bs=32, num_workers=0))
    dls.c = 10
    teacher = create('lenet300', dls, hidden=(20,))
    with pytest.raises(ValueError, match='1-lam is -1'): vbgs_kd(dls, teacher, path=tmp_path/'run', lam=2., show=False)
    run = vbgs_kd(dls, teacher, path=tmp_path/'run', epochs=(2,2,4), show=False)
    assert 'VALIDATION images' in run.report().read_text()

class Nearness(LogitTerm):
    def __call__(self, o): return (1-F.cosine_similarity(o.z_s, o.z_t)).mean()
class Nearby(HeadTerm):
    def head(self, f_s, f_t): return nn.Linear(f_s.flatten(1).shape[1], f_t.flatten(1).shape[1])
    def compare(self, head, f_s, f_t): return 1-F.cosine_similarity(head(f_s.flatten(1)), f_t.flatten(1)).mean()
def heaviest(s): return s.sum({k: w.abs() for k,w in s.weights.items()})
lenets = dict(teacher='lenet5', student='lenet5')
OWN = {'vbgs_kd': (vbgs_kd, lenets | dict(terms=Nearby('conv2')*.5 + Nearness(), epochs=(1,1,1), single_weights=1.), ['student','sparse','thin']),
       'prune_then_distill': (prune_then_distill, lenets | dict(terms=Nearby('conv2'), criterion=heaviest, sparsities=.2, epochs=(1,1,1)), ['student from teacher']),
       'designed': (prune_then_distill, dict(teacher='lenet5', terms='KD + AT', criterion='snip', sparsities=.2, epochs=(1,1,1)), ['ST20 from pruned 0.2']),
       'prue': (prue, lenets | dict(methods=(Nearby('conv2'),Nearness()), criteria=(heaviest,'magnitude'), sparsities=.5, epochs=(1,1,1)), ['by Nearby','by Nearness','from heaviest 0.5']),
       'sequential': (distill_then_prune, lenets | dict(method=(Nearby('conv2'),KD(T=1),KD(T=2)), criterion=heaviest, levels=(0,.5), epochs=(1,1,1)), ['Nearby','KD','KD 2']),
       'vid': (vid, dict(student='lenet5', teacher='lenet5', methods={'mine': Nearby('conv2'), 'AT': 'AT'}, mlp_methods=Nearness(), experiments=('samples','mlp'),
                         n_per_class=None, epochs=(1,1,1,1)), ['mine, lenet5','AT, lenet5','Nearness, MLP-64'])}

@pytest.mark.parametrize('kind', OWN)
def test_terms_and_criteria_of_one_s_own_in_every_recipe(kind, tmp_path, monkeypatch):
    recipe,kwargs,stages = OWN[kind]
    kwargs = dict(dls=data(), path=tmp_path/'run', quick=True, show=False) | kwargs
    run = recipe(**kwargs)
    assert {*stages}<={o['name'] for o in run.stages}
    text = json.dumps(Record(run.path).settings)
    assert ('Near' in text or kind=='designed') and ' at 0x' not in text and ('heaviest' in text or kind in ('vbgs_kd','designed','vid'))
    monkeypatch.setattr(Run, '_train', lambda *args: pytest.fail('something is trained'))
    assert [o['mark'] for o in recipe(**kwargs).stages]==[o['mark'] for o in run.stages]

@pytest.mark.parametrize('recipe,kwargs,says', [
    (vbgs_kd, dict(terms=Nearby), r'terms is Nearby, .* Give an object: Nearby'), (distill_then_prune, dict(method=3), 'method is 3, expected'),
    (vbgs_kd, dict(terms=Nearby('conv9')), 'conv9'), (vbgs_kd, dict(terms='SimKD', **lenets), 'SimKD replaces the student'), (prune_then_distill, dict(terms='magic'), 'no method is called'),
    (prune_then_distill, dict(criterion='group_lasso'), 'scores channels'), (prue, dict(methods=[Nearness]), 'Give an object'), (vid, dict(methods=(Nearby('conv9'),), **lenets), 'conv9')])
def test_what_is_no_term_is_refused(recipe, kwargs, says, tmp_path):
    with pytest.raises((ValueError,AttributeError), match=says): recipe(data(), path=tmp_path/'run', quick=True, show=False, **kwargs)
    assert not (tmp_path/'run').exists()

def loaders(y): return DataLoaders.from_dsets(*[[*zip(torch.rand(8,1,8,8), y)]]*2, bs=4)
@pytest.mark.parametrize('recipe', [vbgs_kd, prune_then_distill, prue, distill_then_prune, vid])
@pytest.mark.parametrize('y', [torch.rand(8,5), torch.rand(8), [.1*i for i in range(8)], torch.zeros(8,8,8).long()], ids=['labels','number','plain number','mask'])
def test_other_targets_than_class_numbers_are_refused(recipe, y, tmp_path):
    with pytest.raises(ValueError, match='targets .*one class number'): recipe(loaders(y), path=tmp_path/'run', show=False)
    assert not (tmp_path/'run').exists()
def test_images_without_labels_are_refused(tmp_path):
    dls = DataLoaders.from_dsets(*[[(o,) for o in torch.rand(8,1,8,8)]]*2, bs=4)
    with pytest.raises(ValueError, match='one class number'): vbgs_kd(dls, path=tmp_path/'run', show=False)
