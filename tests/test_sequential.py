"Malihi and Heidemann 2023 end to end: what is fine-tuned, what is counted, what is run again; Malihi and Heidemann 2023 and Ahn et al. 2019 in two processes."
from types import SimpleNamespace

import pytest
from common import data, quiet
from kdnb.all import *

def recipe(path, dls=None, teacher='lenet5_caffe', student='lenet5_caffe', epochs=(15,20,2), **kwargs):
    kwargs = dict(levels=(0,.3,.6,.9), lr=1e-2, show=False) | kwargs
    return distill_then_prune(dls or data(), teacher, student, path, epochs, **kwargs)

@pytest.fixture(scope='module')
def done(tmp_path_factory): return recipe(tmp_path_factory.mktemp('sequential')/'run', seeds=2)

def rows(run, name): return [o for o in run.stages if o['name']==name]

def test_only_the_last_layer_is_tuned(done):
    "Zeros stay zeros, and nothing but the last layer moves, also no statistics of batch normalisation"
    pruned,tuned = (done.models[k].state_dict() for k in ('pruned','tuned'))
    assert pruned.keys()==tuned.keys()
    moved = {k for k in pruned if not torch.equal(pruned[k], tuned[k])}
    assert moved=={'head.fc2.weight','head.fc2.bias'}      # the classifier that SimKD took over from the teacher
    assert all((tuned[k][pruned[k]==0]==0).all() for k in moved if k.endswith('weight'))
    assert all(p.requires_grad for p in done.models['tuned'].parameters())

def test_the_table_counts_what_is_left(done):
    df,whole = compression_table(done),rows(done, 'teacher')[0]['weights']
    for name in df.index:
        left = np.mean([sum(int((m.weight!=0).sum()) for m in done.networks[name,o['seed']].modules() if isinstance(m, (nn.Linear,nn.Conv2d)))
                        for o in rows(done, name)])
        assert df.loc[name,'compression rate']==round(whole/left, 2)
        assert df.loc[name,'percentage decrease (%)']==pytest.approx(100*(whole-left)/whole, abs=.006)
        assert df.loc[name,'accuracy (%)']==pytest.approx(100*np.mean([o['test_accuracy'] for o in rows(done, name)]), abs=.006)
    at = rows(done, 'tuned')[0]['sparsity']
    assert at in (0,.3,.6,.9) and {o['sparsity'] for o in rows(done, 'tuned')}=={at}     # one breakpoint for all seeds
    assert rows(done, 'tuned')[0]['weights']==rows(done, 'SimKD')[0]['weights'] - math.ceil(at*rows(done, 'SimKD')[0]['weights'])
    assert df.equals(compression_table(Record(done.path)))

def test_the_small_network_computes_what_its_file_holds(done):
    small = load_model(done.path/'model.safetensors')
    assert max_difference(small, done.models['channels'], done.dls)<1e-4
    assert rows(done, 'small')[0]['macs']<=rows(done, 'tuned')[0]['macs']

def test_a_changed_setting_runs_what_follows(done, tmp_path):
    shutil.copytree(done.path, tmp_path/'run')
    took = {(o['name'],o['seed']): o.get('seconds') for o in done.stages}
    with pytest.raises(ValueError, match='tune_lr is 0.002, was 0.001'): recipe(tmp_path/'run', seeds=2, tune_lr=2e-3)
    (tmp_path/'run'/'model.safetensors').unlink()       # it is open again
    with pytest.warns(UserWarning, match=r"'tuned' of seed 1 is trained again: lr is 0.002, was 0.001 .tune_lr is 0.002, was 0.001.\."):
        run = recipe(tmp_path/'run', seeds=2, tune_lr=2e-3)
    same = {k for k,v in took.items() if v and v==next(o['seconds'] for o in run.stages if (o['name'],o['seed'])==k)}
    assert same=={('teacher',0),('SimKD',0),('SimKD',1)}

@pytest.mark.long
def test_nothing_to_prune_is_no_error(tmp_path):
    "Where every level costs too much, the breakpoint is the whole network"
    run = recipe(tmp_path/'run', levels=(0,.4,.8), criterion='random')
    assert rows(run, 'tuned')[0]['sparsity']==0 and rows(run, 'small')[0]['weights']==rows(run, 'SimKD')[0]['weights']

@pytest.mark.long
def test_a_trained_teacher_several_methods_and_data_without_a_test_set(tmp_path):
    x,y = image_dls('digits').test.dataset[torch.arange(200)]
    items = [(TensorImage(a.float()/255),TensorCategory(b)) for a,b in zip(x, y)]
    dls = DataLoaders(TfmdDL(items[:150], bs=32, shuffle=True, num_workers=0), TfmdDL(items[150:], bs=32, num_workers=0))
    dls.c = 10
    teacher = quiet(Learner(dls, create('lenet5_caffe', dls), CrossEntropyLossFlat(), metrics=accuracy), 1, 1e-3)
    student = nn.Sequential(nn.Conv2d(1,6,3,padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96,10))
    before = deepcopy(teacher.model.state_dict())
    run = recipe(tmp_path/'run', dls, teacher, student, method=('AT','KD + SP'), channels=False, sweep_epochs=1, levels=(0,.5), repeats=2)
    assert [o['name'] for o in run.stages]==['teacher','AT','KD + SP','teacher tuned','pruned','tuned']
    best = max(('AT','KD + SP'), key=lambda k: rows(run, k)[0]['valid_accuracy'])
    assert rows(run, 'tuned')[0]['method']==best and 'methods' in run.exhibits and not run.has_test
    assert len(run.exhibits['curves'].data['student'])==4 and 'student, channels' not in run.exhibits['curves'].data
    assert all(torch.equal(v, before[k]) for k,v in teacher.model.state_dict().items())

@pytest.mark.parametrize('says,kwargs', [
    ("no method is called 'magic'", dict(method='magic')), ('expected fractions from 0', dict(levels=(.1,.5))),
    ('each of levels is 2', dict(levels=(0,2))), ('scores channels', dict(criterion='bn_scale')), ('scope is', dict(scope='net')),
    ('no channels that can be removed', dict(method='KD', student=nn.Sequential(nn.Flatten(), nn.Linear(64,10)))), ('expected 3 whole numbers', dict(epochs=(1,1))), ('no setting', dict(sparsity=.5)),
    ('cannot take images of shape', dict(student=lenet5())), ('no maps', dict(student='lenet300')), ('no network is called', dict(teacher='vgg20'))])
def test_mistakes_are_said_before_anything_is_trained(says, kwargs, tmp_path):
    with pytest.raises(ValueError, match=says): recipe(tmp_path/'run', **kwargs)
    assert not (tmp_path/'run').exists()

def test_two_processes_come_to_an_end(two_processes):
    "Sweeps, fine-tuning and heat maps are not done by each process for itself while the other waits"
    a,b = Record(two_processes/'sequential'),Record(two_processes/'vid')
    assert [o['name'] for o in a.stages][-1]=='small' and len(a.exhibits['curves'].data['student'])==2
    assert [o['name'] for o in b.stages]==['Teacher','Student, resnet8','VID-I, resnet8','Student, read by VID-I'] and 'likelihood' in b.exhibits

@pytest.mark.long
def test_the_defaults_pass_the_checks_on_digits(tmp_path, monkeypatch):
    "ResNet-101 teaches ResNet-18 by SimKD: on 8 × 8 pixels, too, the first training begins"
    class Begun(Exception): pass
    def begin(self, *args, **kwargs): raise Begun
    monkeypatch.setattr(Run, 'teacher', begin)
    with pytest.raises(Begun): distill_then_prune(image_dls('digits'), path=tmp_path/'run', show=False)

def test_more_seeds_that_change_the_breakpoint_are_named(tmp_path, monkeypatch):
    "The breakpoint is one for all seeds: with another one a finished result would be another"
    from kdnb.recipes import sequential
    run = recipe(tmp_path/'run', epochs=(1,1,1), channels=False)
    found = sequential.find_breakpoint
    monkeypatch.setattr(sequential, 'find_breakpoint', lambda df: SimpleNamespace(sparsity=.9 if abs(found(df).sparsity-.9)>.1 else .3))
    with pytest.raises(ValueError, match='seeds are 0, 1, were 0'): recipe(tmp_path/'run', epochs=(1,1,1), channels=False, seeds=2)

def test_the_record_holds_the_curve_of_every_seed(done):
    "Means over repeats, and the breakpoint of that curve alone"
    for name,curve in (('teacher tuned','teacher'), ('tuned','student'), ('small','student, channels')):
        df = done.exhibits['curves'].data[curve]
        each = [df[i:i+4] for i in range(0, len(df), 4)]      # a part for each seed, in their order
        for o,part in zip(rows(done, name), each):
            assert len(o['curve_sparsity'])==4 and o['curve_sparsity']==part.sparsity.round(6).tolist()
            assert o['curve_weights']==part.weights.tolist() and np.allclose(o['curve_accuracy'], part.accuracy, atol=1e-6)
            assert o['breakpoint']==find_breakpoint(part).sparsity
    assert len(rows(done, 'teacher tuned'))==1 and len(rows(done, 'tuned'))==2
    assert json.loads((done.path/'stages'/'tuned-seed1.json').read_text())['curve_accuracy']==rows(done, 'tuned')[1]['curve_accuracy']

@pytest.mark.long
def test_repeats_differ_and_each_is_kept(tmp_path, monkeypatch):
    "Last layers are tuned in another order each time; a sweep that was stopped goes on at its repeat"
    import kdnb.recipes.sequential as module
    kwargs = dict(channels=False, sweep_epochs=1, levels=(0,.5), repeats=3, epochs=(1,1,1), method='KD')
    whole,calls,true = recipe(tmp_path/'whole', **kwargs),[],module.sweep_sparsity
    df = whole.exhibits['curves'].data['student']
    assert df.repeat.tolist()==[0,0,1,1,2,2] and df.valid_loss.nunique()==6
    def stopping(*args, **kwargs):
        calls.append(kwargs['seed'])
        if len(calls)==5: raise KeyboardInterrupt
        return true(*args, **kwargs)
    monkeypatch.setattr(module, 'sweep_sparsity', stopping)
    with pytest.raises(KeyboardInterrupt): recipe(tmp_path/'run', **kwargs)
    release(tmp_path/'run')
    run = recipe(tmp_path/'run', **kwargs)
    assert calls==[0,1,2,0,1,1,2] and run.exhibits['curves'].data['student'].equals(df)
