"Ahn et al. 2019 end to end: what is trained, with how many images, what the tables show."
from types import SimpleNamespace

import pytest
from common import X, Y, data, quiet
from kdnb.all import *

def digits(classes):
    here = torch.isin(Y, torch.tensor(classes))
    return from_arrays(X[here], Y[here]-classes[0], vocab=list(classes), test=(X[here][:40], Y[here][:40]-classes[0]))

def recipe(path, dls=None, teacher='resnet8', student='resnet8', epochs=(1,1,1,1), **kwargs):
    return vid(dls or data(), teacher, student, path, epochs, quick=True, show=False, **kwargs)

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    return recipe(tmp_path_factory.mktemp('vid')/'run', experiments=('samples','sizes','maps'), n_per_class=(None,4), students=('resnet14','resnet8'),
                  methods=('VID-I','KD + AT'), seeds=2)

def test_every_training_is_done_once_and_has_the_images_it_should(done):
    names = [(o['name'],o['seed']) for o in done.stages]
    assert len(set(names))==len(names)==1 + 2*3*(2+1) + 1       # teacher; methods × (two sizes of data, another student); q of the lone student
    few = [o for o in done.stages if o.get('n_per_class')=='4']
    assert {o['images'] for o in few}=={40} and {o['images'] for o in done.stages if o.get('n_per_class')=='all'}=={len(done.dls.train.dataset)}
    assert {o['epochs'] for o in few}=={round(len(done.dls.train)/1)}     # as many updates: 40 images are one batch

def test_tables_are_means_of_their_stages(done):
    for experiment,wanted in dict(samples={'all': 'VID-I, resnet8', '4': 'VID-I, resnet8, 4 per class'},
                                  sizes={'resnet14': 'VID-I, resnet14', 'resnet8': 'VID-I, resnet8'}).items():
        table = vid_table(done, experiment)
        assert list(table.columns)==list(wanted) and list(table.index)==['Teacher','Student','VID-I','KD + AT']
        for column,name in wanted.items():
            acc = [100*o['test_accuracy'] for o in done.stages if o['name']==name]
            assert table.loc['VID-I',column]==f'{np.mean(acc):.2f} ± {np.std(acc, ddof=1):.2f}'
        assert table.equals(vid_table(Record(done.path), experiment))

@pytest.mark.long
def test_what_was_watched_is_there_when_nothing_is_trained(done):
    again = recipe(done.path, experiments=('samples','sizes','maps'), n_per_class=(None,4), students=('resnet14','resnet8'),
                   methods=('VID-I','KD + AT'), seeds=2)
    assert [o.get('seconds') for o in again.stages]==[o.get('seconds') for o in done.stages]
    a,b = (o.exhibits['likelihood'].data for o in (done, again))
    assert list(a)==list(b)==['image','epoch 1','student alone','|layer1|'] and all(torch.equal(a[k], b[k]) for k in a)
    assert a['epoch 1'].shape==(4,8,8) and not torch.equal(a['epoch 1'], a['student alone'])
    lone,plain = (again.models[k].state_dict() for k in ('Student, read by VID-I','Student, resnet8'))
    assert all(torch.equal(v, plain[k]) for k,v in lone.items())     # only q learns

@pytest.mark.long
def test_a_run_that_is_stopped_shows_what_another_shows(tmp_path, monkeypatch):
    def maps(path): return recipe(path, epochs=(1,4,1,1), experiments='maps').exhibits['likelihood'].data
    whole = maps(tmp_path/'whole')
    def stop(self):
        if self.training and self.epoch==3: raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(LikelihoodWatch, 'before_batch', stop, raising=False)
        maps(tmp_path/'stopped')
    resumed = maps(tmp_path/'stopped')
    assert list(resumed)==['image','epoch 1','epoch 2','epoch 4','student alone','|layer1|']
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)

def test_all_lambdas_are_tried_and_the_best_on_the_validation_set_is_shown(tmp_path):
    run = recipe(tmp_path/'run', experiments='mlp', hidden=(8,), mlp_methods=('KD',), weights=dict(KD=(1,10)), task=(1,.1), choose=True)
    tried = [o for o in run.stages if o.get('method')=='KD']
    assert [(o['task'],o['term_weights']) for o in tried]==[(t,{'KD': w}) for t in (1,.1) for w in (1,10)]
    best = max(tried, key=lambda o: o['valid_accuracy'])
    assert vid_table(run, 'mlp').loc['KD','MLP-8']==f'{100*best["test_accuracy"]:.2f}'

@pytest.mark.long
def test_transfer_from_data_or_from_a_network(tmp_path):
    src,dst = digits(range(6)),digits(range(6,10))
    methods = ('fine-tuning','LwF','VID-LP + VID-I')
    run = recipe(tmp_path/'a', dst, source=src, experiments='transfer', transfer_methods=methods, n_per_class=5)
    assert list(vid_table(run, 'transfer').index)==['Student',*methods] and list(vid_table(run, 'transfer').columns)==['5']
    teacher = run.models['Teacher of the source']
    assert teacher.fc.out_features==6 and run.stages[0]['test_accuracy']==accuracy_on(teacher, src.test)
    before = deepcopy(teacher.state_dict())
    other = recipe(tmp_path/'b', dst, source=Learner(src, teacher, CrossEntropyLossFlat()), experiments='transfer',
                   transfer_methods=methods, n_per_class=5)
    assert [o['name'] for o in other.stages]==[o['name'] for o in run.stages if 'source' not in o['name'] and 'fine' not in o['name']]
    theirs,ours = ({o['name']: o['test_accuracy'] for o in r.stages} for r in (run, other))
    assert all(theirs[k]==v for k,v in ours.items())
    assert all(torch.equal(v, before[k]) for k,v in teacher.state_dict().items())

def test_a_trained_teacher_and_data_that_cannot_be_cut(tmp_path):
    items = [(TensorImage(a.float()/255),TensorCategory(b)) for a,b in zip(X, Y)]
    dls = DataLoaders(TfmdDL(items[:150], bs=32, shuffle=True, num_workers=0), TfmdDL(items[150:], bs=32, num_workers=0))
    dls.c = 10
    teacher = quiet(Learner(dls, create('resnet8', dls), CrossEntropyLossFlat(), metrics=accuracy), 1, 1e-3)
    with pytest.raises(ValueError, match='cannot be cut'): recipe(tmp_path/'run', dls, teacher, n_per_class=(None,3))
    run = recipe(tmp_path/'run', dls, teacher, n_per_class=None, experiments='samples', methods=('VID-I',))
    assert [o['name'] for o in run.stages]==['Teacher','Student, resnet8','VID-I, resnet8'] and 'samples_lines' not in run.exhibits

def test_learning_without_forgetting_learns_a_last_layer_of_its_own():
    dls = data()
    student,teacher = create('lenet5', dls),create('lenet5', dls, c=7)
    kd = KnowledgeDistillation(teacher, named_term('LwF', student, teacher, dls))
    Learner(dls, student, CrossEntropyLossFlat(), cbs=kd)
    head,f,z = kd.heads['lwf'],torch.randn(5,84),3*torch.randn(5,7)
    p,q = ((o.double()/2).log_softmax(1) for o in (z, head(f)))
    assert head.weight.shape==(7,84)
    assert kd.terms['lwf'](SimpleNamespace(z_t=z, f_s={'act2': f}, head=head)).item()==pytest.approx((p.exp()*(p-q)).sum(1).mean().item(), rel=1e-5)

@pytest.mark.parametrize('says,kwargs', [
    ('there is no experiment', dict(experiments='tables')), ('needs source=', dict(experiments='transfer')), ('source is int', dict(source=3)),
    ('from 1 to', dict(n_per_class=1000)), ('no method is called', dict(methods=('magic',))), ('task is -1', dict(task=-1)),
    ('expected tuple', dict(students=(nn.Identity(),))), ('students is', dict(students=(1,))), ('expected 4 whole numbers', dict(epochs=1)), ('clip is', dict(clip=-1)),
    ('no maps', dict(student='lenet300')), ("source's images are", dict(source=from_arrays(torch.zeros(40,9,9), torch.arange(40)%4)))])
def test_mistakes_are_said_before_anything_is_trained(says, kwargs, tmp_path):
    with pytest.raises(ValueError, match=says): recipe(tmp_path/'run', **kwargs)
    assert not (tmp_path/'run').exists()

@pytest.mark.long
def test_the_source_may_be_named(tmp_path):
    "As a grid or the command line does it: the same run as with its loaders"
    kwargs = dict(dls=image_dls('digits', bs=32, n_per_class=20, device='cpu'), experiments='transfer', transfer_methods=('VID-I',), n_per_class=5)
    named = recipe(tmp_path/'a', source=dict(name='digits', n_per_class=10), **kwargs)
    given = recipe(tmp_path/'b', source=image_dls('digits', bs=32, n_per_class=10, device='cpu'), **kwargs)
    assert [o['mark'] for o in named.stages]==[o['mark'] for o in given.stages] and [o['name'] for o in named.stages][0]=='Teacher of the source'
    assert Record(named.path).settings['source']==dict(name='digits', n_per_class=10) and given.settings['source']=='ArrayDataLoaders'
    for wrong,says in {'digit': 'no image set', ('digits',): 'source is tuple'}.items():
        with pytest.raises(ValueError, match=says): recipe(tmp_path/'c', source=wrong, **kwargs)
    with pytest.raises(ValueError, match='names no image set'): recipe(tmp_path/'c', source=dict(bs=4), **kwargs)

@pytest.mark.long
def test_all_images_can_be_written_as_text(tmp_path):
    a,b = (recipe(tmp_path/str(n), experiments='samples', methods=('KD',), n_per_class=(n,4)) for n in (None,'all'))
    assert [o['mark'] for o in a.stages]==[o['mark'] for o in b.stages] and list(vid_table(b))==['all','4']
