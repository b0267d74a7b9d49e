"The command line: what it says, what it hands on, and a folder of images from end to end."
import inspect, re, subprocess, sys
from types import SimpleNamespace

import pandas as pd
import pytest
from common import X, Y
from PIL import Image
from kdnb.cli import command,commands
from kdnb.all import *
from kdnb.cli import main

def said(capsys, status, *argv):
    "What the command with `argv` prints, if it ends with `status`"
    assert main([str(o) for o in argv])==status
    out = capsys.readouterr()
    if status: assert out.err.startswith('kdnb: ') and out.err.count('\n')==1
    return out.err if status else out.out

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "200 images and a table of labels"
    root = tmp_path_factory.mktemp('photos')
    for i in range(200): Image.fromarray(X[i,0].numpy()).save(root/f'{i:03}.png')
    pd.DataFrame(dict(name=[f'{i:03}.png' for i in range(200)], label=[f'digit {int(y)}' for y in Y[:200]])).to_csv(root/'labels.csv', index=False)
    return root

@pytest.fixture(scope='module')
def run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'mine'
    argv = ['compress','--data',photos,'--teacher','lenet300','--epochs','2,2,4','--seeds','2','--set','gamma_weight=20','lam=.5','--out',out,'--quiet']
    assert main([str(o) for o in argv])==0
    return out,argv

def test_a_folder_of_images_from_end_to_end(run, photos, capsys):
    out,argv = run
    r = Record(out)
    assert (r.data,r.seeds,r.settings['lam'],r.settings['gamma_weight'],r.settings['epochs'])==(photos.name,(0,1),.5,20,[2,2,4])
    assert r.n_test==40 and r.has_test and [o['seed'] for o in r.stages]==[0]*4+[1]*4
    model = load_model(out/'model.safetensors')
    dls = image_dls(photos)
    assert accuracy_on(model, dls.test)==r.stages[3]['test_accuracy'] and dls.vocab[7]=='digit 7'
    before = {f: f.read_bytes() for f in (out/'stages').iterdir()}
    text = said(capsys, 0, *argv)                                                                 # again: nothing is trained
    assert {f: f.read_bytes() for f in (out/'stages').iterdir()}==before
    for o in ('teacher','small','±','Report: ',f"load_model('{out/'model.safetensors'}')",'means of 2 seeds'): assert o in text

@pytest.mark.long
def test_the_network_of_a_run_as_onnx(run, photos, capsys, tmp_path):
    pytest.importorskip('onnxruntime')
    out,file = run[0],tmp_path/'small.onnx'
    assert 'pass the folder as --data FOLDER' in said(capsys, 1, 'export', out).replace('Pass', 'pass')
    text = said(capsys, 0, 'export', out, '--onnx', '--data', photos, '--out', file)
    net,(x,_) = OnnxNetwork(file),folder_dls(photos).valid.one_batch()
    model = load_model(out/'model.safetensors')
    assert 'equal predictions' in text and net.header['stats']==read_header(out/'model.safetensors')[0]['stats']
    assert torch.equal(net(x).argmax(1), model(x.as_subclass(Tensor)).argmax(1)) and len(net.header['classes'])==10
    assert 'int8' in said(capsys, 0, 'export', out, '--int8', '--max-drop', 1, '--data', photos, '--out', file)
    page = (out/'report.html').read_text()      # written anew, with what the file takes
    assert '<h2>Without torch</h2>' in page and 'small.onnx' in page and f'Report, with size and speed of the file: {out/"report.html"}' in text

def test_report_of_one_and_of_two(run, tmp_path, capsys, monkeypatch):
    out,_ = run
    def page():
        "The report, without the networks that another test has exported from this run"
        return re.sub('<h2>Without torch</h2>.*?(?=<h2>How it was made)', '', (out/'report.html').read_text(), flags=re.DOTALL)
    before = page()
    (out/'report.html').unlink()
    assert 'Report: ' in said(capsys, 0, 'report', out) and page()==before
    shutil.copytree(out, tmp_path/'other')
    assert str(tmp_path/'two.html') in said(capsys, 0, 'report', out, tmp_path/'other', '--out', tmp_path/'two.html')
    assert 'mine and other' in (tmp_path/'two.html').read_text()
    monkeypatch.chdir(tmp_path)
    said(capsys, 0, 'report', out, 'other')
    assert (tmp_path/'compare.html').exists()
    assert 'is not the folder of a run' in said(capsys, 1, 'report', tmp_path)
    assert 'more than once' in said(capsys, 1, 'report', out, out)

def test_report_of_a_run_without_a_stage(tmp_path, capsys):
    Run(tmp_path/'run', 'own', image_dls('digits'), show=False)
    text = said(capsys, 0, 'report', tmp_path/'run')
    assert 'No stage is done yet.' in text and 'Report: ' in text

def test_data(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('KDNB_DATA', str(tmp_path))
    text = said(capsys, 0, 'data')
    assert str(tmp_path) in text and all(o in text for o in image_sets) and 'missing' in text
    (tmp_path/'MNIST'/'raw').mkdir(parents=True)
    (tmp_path/'MNIST'/'raw'/'train-labels-idx1-ubyte.gz').write_bytes(b'x')
    assert main(['data'])==1 and 'INCOMPLETE' in capsys.readouterr().out
    text = said(capsys, 0, 'data', photos)
    assert re.search(r'all +142 +18 +40', text) and 'digit 3' in text and '8×8 pixels, grey' in text
    assert '16×12 pixels' in said(capsys, 0, 'data', photos, '--size', '16,12')
    assert 'no folder' in said(capsys, 1, 'data', tmp_path/'none')

def test_what_is_odd_in_a_folder_is_one_line(photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path/'set')
    Image.fromarray(X[0,0].numpy()).save(tmp_path/'set'/'more.png')
    assert main(['data',str(tmp_path/'set')])==0
    assert capsys.readouterr().err==f'kdnb: left out of {tmp_path/"set"}, 1 that are not in labels.csv: more.png.\n'

@pytest.mark.parametrize('argv,says', [
    (['--data','mnits'], "no image set is called 'mnits', and no folder either"), (['--student','lenet6'], 'no network is called'),
    (['--set','nono=3'], 'nono'), (['--epochs','1,2'], 'epochs is (1, 2)'), (['--seeds','1,1'], 'seeds is'),
    (['--set','lam=2'], '1-lam is -1'), (['--set','lr=big'], "lr is 'big', expected float, such as 0.001"), (['--set','pct_start=2'], '--pct-start is 2'),
    (['--set','seeds=1.5'], 'seeds is 1.5'), (['--set','T_log_alpha=abc'], "--T-log-alpha is 'abc'"), (['--set','cooldown=.5'], 'cooldown is 0.5'),
    (['--recipe','vid','--set','weights=3'], 'weights is 3'), (['--recipe','vid','--set','hidden=x'], "hidden is 'x'"),
    (['--recipe','prue','--set','drops=(.5,"a")'], 'drops is (0.5'), (['--recipe','sequential','--set','levels=.5'], 'levels are (0.5,)'),
    (['--recipe','sequential','--set','method=3'], 'method is 3')])
def test_mistakes_are_sentences(argv, says, tmp_path, capsys):
    assert says in said(capsys, 1, 'compress', '--out', tmp_path/'run', '--quiet', *argv)
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('argv,says', [
    (['compress','--epochs','a,b'], 'commas between'), (['compress','--seeds',''], 'commas between'), (['compress','--lam','big'], 'expected float'), (['compress','--set','lam'], 'name=value'),
    (['compress','--recipe','magic'], "choose from 'budget'"), (['sweep','grid.toml'], '--storage'),
    (['compress','--set','dls=1'], '--data, --out'), (['compress','--bs','0'], 'from 1 on'), (['compress','--pad','-3'], 'from 0 on'),
    (['compress','--size','8,8,8'], 'height,width'), (['data','--size','0'], 'height,width'), ([], 'COMMAND')])
def test_mistypings_are_status_2(argv, says, capsys):
    with pytest.raises(SystemExit, match='2'): main(argv)
    assert says in capsys.readouterr().err

OWN = '''
from kdnb.all import *
class Nearness(LogitTerm):
    usual,aliases = 7.,('near-ness',)
    def __call__(self, o): return (1-F.cosine_similarity(o.z_s, o.z_t)).mean()
def heaviest(s): return s.sum({k: w.abs() for k,w in s.weights.items()})
criteria['heaviest'] = heaviest
@recipe
def of_mine(dls, path, data='user data', seeds=1, force=False, show=True, n_epoch=1, terms=None):
    run = Run(path, 'of-mine', dls, data, seeds, force, show, n_epoch=n_epoch, terms=terms)
    t = run.teacher('lenet300', 1, 1e-3)
    for _ in run.each_seed():
        student = run.fit('student', run.learner(run.network('lenet300')), n_epoch, 1e-3, cbs=KnowledgeDistillation(t, Nearness()))
        pruned = run.fit('pruned', run.learner(student), n_epoch, 1e-3, cbs=Pruner(.5, 'heaviest'), of=student)
    return run.finish(run.models['pruned'], of=run.models['student'])
def returns_nothing(dls, path): pass
'''

@pytest.fixture
def own(tmp_path, monkeypatch):
    "A file of one's own beside which the command is given; what it registers is forgotten afterwards"
    from kdnb.recipes.registry import recipes
    monkeypatch.setattr('kdnb.recipes.registry.recipes', recipes | {})
    for o in ('own','own_terms'): monkeypatch.delitem(sys.modules, o, raising=False)
    monkeypatch.setitem(criteria, 'heaviest', None); del criteria['heaviest']
    monkeypatch.chdir(tmp_path)
    (tmp_path/'own.py').write_text(OWN)
    return tmp_path

@pytest.mark.long
@pytest.mark.parametrize('how', [['--import','own.py','--recipe','of-mine'], ['--recipe','own.py:of_mine'], ['--recipe','own:of_mine']])
def test_a_recipe_of_one_s_own(how, own, photos, capsys):
    argv = ['compress',*how,'--data',photos,'--quiet','--out','run']
    text = said(capsys, 0, *argv)
    assert [o['name'] for o in Record('run').stages]==['teacher','student','pruned'] and 'Report: run/report.html' in text
    before = {o: o.read_bytes() for o in Path('run').rglob('*') if o.is_file()}
    said(capsys, 0, *argv)                                        # its result is read, masks and all
    assert {o: o.read_bytes() for o in before}==before
    assert "n_epoch is 2, was 1. Choose another folder, or begin anew with --force." in said(capsys, 1, *argv, '--set', 'n_epoch=2')
    assert {o: o.read_bytes() for o in before}==before

def test_an_own_recipe_says_what_it_takes(own, photos, capsys):
    argv = ['compress','--data',photos,'--quiet','--recipe']
    assert "the recipe of_mine takes no teacher='lenet5'. It takes path" in said(capsys, 1, *argv, 'own.py:of_mine', '--set', 'teacher=lenet5')
    with pytest.raises(SystemExit, match='2'): main([str(o) for o in (*argv, 'own.py:of_mine', '--teacher', 'lenet5')])
    assert 'unrecognized arguments: --teacher lenet5' in capsys.readouterr().err
    assert 'returned NoneType, expected its run' in said(capsys, 1, *argv, 'own.py:returns_nothing')
    assert "there is no recipe own.py:nothing: own.py has no function 'nothing'" in said(capsys, 1, *argv, 'own.py:nothing')
    assert 'nowhere.py could not be imported: FileNotFoundError' in said(capsys, 1, *argv, 'nowhere.py:mine')
    (own/'json.py').write_text('def mine(dls, path): pass')        # a name that is taken
    for _ in range(2): assert 'the recipe mine returned NoneType' in said(capsys, 1, *argv, 'json.py:mine')
    (own/'broken.py').write_text('x = 1/0')
    assert 'broken.py could not be imported: ZeroDivisionError' in said(capsys, 1, 'compress', '--import', 'broken.py', '--quiet')
    with pytest.raises(SystemExit, match='2'): main(['compress','--import','own.py','--recipe','other'])
    assert "'of-mine'" in capsys.readouterr().err
    recipe('registered')(lambda dls, path: None)                  # in Python, before the command
    assert 'returned NoneType' in said(capsys, 1, *argv, 'registered')

@pytest.mark.long
@pytest.mark.parametrize('name', ['Nearness','near-ness'])
def test_a_term_of_one_s_own_by_name_has_its_usual_weight(name, own, photos, capsys, monkeypatch):
    weights = []
    class Seen(KnowledgeDistillation):
        def before_fit(self):
            weights.extend(t.weight for t in self.terms.values())
            super().before_fit()
    monkeypatch.setattr('kdnb.recipes.sequential.KnowledgeDistillation', Seen)
    argv = ['compress','--recipe','sequential','--quick','--data',photos,'--quiet','--import','own.py','--set',f'method={name}','levels=(0,.5)']
    said(capsys, 0, *argv, '--student', 'lenet300', '--teacher', 'lenet300', '--epochs', '1,1,1', '--out', 'run')
    assert weights and {*weights}=={7.} and Record('run').settings['method']==[name]

def test_a_criterion_of_one_s_own_by_name(own, photos, capsys):
    argv = ['compress','--recipe','prune-then-distill','--quick','--data',photos,'--quiet','--import','own.py','--set','criterion=heaviest']
    argv += ['--student','lenet300','--teacher','lenet300','--epochs','1,1,1','--out','run','--set','sparsities=.2','pairs=alone']
    said(capsys, 0, *argv)
    assert Record('run').settings['criterion']=='heaviest'
    assert 'values' in {o.name for o in Path('run').iterdir()}

@pytest.mark.parametrize('argv,says', [
    (['--set','n_per_class=9999','--recipe','vid'], '--n-per-class has 9999'), (['--epochs','1,2'], '--epochs is (1, 2)'), (['--seeds','1,1'], '--seeds is'),
    (['--set','experiments=transfer','--recipe','vid'], "'transfer' needs --source")])
def test_mistakes_speak_of_options(argv, says, tmp_path, capsys):
    assert says in said(capsys, 1, 'compress', '--out', tmp_path/'run', '--quiet', *argv)

def test_images_of_several_sizes_are_told_of_the_option(tmp_path, capsys):
    for i in range(20): (tmp_path/str(i%2)).mkdir(exist_ok=True), Image.new('L', (8,8+i%2)).save(tmp_path/str(i%2)/f'{i}.png')
    for argv in (['data',tmp_path], ['compress','--data',tmp_path,'--out',tmp_path/'run']):
        text = said(capsys, 1, *argv)
        assert 'such as --size 64.' in text and 'size=' not in text

def test_what_the_source_says_is_what_python_knows():
    "Names, parameters and settings that are read from the files are those of the functions"
    from kdnb.recipes.registry import find_recipe,not_options,shipped
    for name,o in shipped.items():
        f = find_recipe(name)
        takes = [k for k,p in inspect.signature(f).parameters.items() if p.kind!=p.VAR_KEYWORD][1:]
        fields = getattr(f.settings, '__dataclass_fields__', f.settings)
        assert [*o.options]==[k for k in dict.fromkeys([*takes, *fields]) if k not in not_options]
        assert o.help and all(v.doc for v in o.options.values()), name

MINE = '''
from dataclasses import dataclass
from kdnb.all import *
from kdnb.recipes.settings import Settings,check_settings
@dataclass
class MineSettings(Settings):
    width:int = 16 # Of the hidden layer
    rate:float = 3e-3 # Learning rate
@recipe('of-width', help='a network as wide as you say', settings=MineSettings)
def of_width(dls, path='runs/of-width', epochs:int=1, # Of the only training
             seeds=1, data='user data', quick=False, force=False, show=True, **settings):
    s = check_settings('of-width', settings, MineSettings)
    run = Run(path, 'of-width', dls, data, seeds, force, show, epochs=epochs, **vars(s))
    for _ in run.each_seed(): model = run.fit('net', run.learner(run.network('mlp', hidden=s.width)), epochs, s.rate)
    return run.finish(run.models['net'])
'''

def test_a_recipe_in_one_file_is_on_the_command_line_in_sweeps_and_in_reports(photos, tmp_path, monkeypatch, capsys):
    from kdnb.recipes.registry import recipes
    pytest.importorskip('optuna')
    monkeypatch.setattr('kdnb.recipes.registry.recipes', recipes | {})
    monkeypatch.delitem(sys.modules, 'mine_alone', raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine_alone.py').write_text(MINE)
    argv = ['compress','--import','mine_alone.py','--recipe','of-width','--data',str(photos)]
    with pytest.raises(SystemExit, match='0'): main([*argv, '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert '--width VALUE Of the hidden layer [16]' in text and '--epochs VALUE Of the only training [1]' in text
    assert 'mine_alone' not in sys.modules                        # it was read, not run
    assert "expected int" in said(capsys, 1, *argv, '--set', 'width=wide', '--out', 'run')
    assert "has no setting 'depth'. There are width, rate" in said(capsys, 1, *argv, '--set', 'depth=3', '--out', 'run')
    said(capsys, 0, *argv, '--width', 8, '--quiet', '--out', 'run')
    assert Record('run').settings==dict(epochs=1, width=8, rate=3e-3) and 'of-width' in Path('run/report.html').read_text()
    (tmp_path/'grid.toml').write_text(f'recipe = "of-width"\ndata = "{photos}"\nimports = ["mine_alone.py"]\n[grid]\nwidth = [4, 8]\n')
    text = said(capsys, 0, 'sweep', 'grid.toml', '--storage', 'log', '--out', 'sweep', '--quiet')
    assert '2 finished' in text
    (tmp_path/'odd.toml').write_text((tmp_path/'grid.toml').read_text().replace('width', 'wide'))
    assert 'wide' in said(capsys, 1, 'sweep', 'odd.toml', '--storage', 'log2', '--out', 'sweep2')
    said(capsys, 0, 'report', 'run', next(Path('sweep').glob('*/run.json')).parent, '--out', 'both.html')

def test_what_is_handed_to_the_recipe(monkeypatch, tmp_path, capsys):
    got = {}
    def recipe(dls, **kwargs): got.update(kwargs, dls=dls); raise KeyboardInterrupt
    monkeypatch.setattr('kdnb.recipes.registry.find_recipe', lambda name: got.update(name=name) or recipe)
    text = said(capsys, 130, 'compress', '--recipe', 'prue', '--quick', '--seeds', '4,5', '--set', 'levels=(.2,.5)', 'kind=l1', '--set', 'on=true',
                '--bs', 32, '--pad', 1, '--flip', '--epochs', 7)
    assert text=='kdnb: stopped. The same command goes on where it stopped.\n'
    dls = got.pop('dls')
    assert got==dict(name='prue', path=Path('runs/prue-digits'), data='digits', seeds=(4,5), quick=True, show=True, epochs=7,
                     levels=(.2,.5), kind='l1', on=True)
    assert dls.train.bs==32 and dls.train.augments

def test_each_folder_has_a_name_of_its_own(photos, tmp_path):
    from kdnb.cli import parser
    def name(o): return commands._load_data(parser().parse_args(['compress','--data',str(o)]))[1]
    for o in ('a.v1','a.v2'): shutil.copytree(photos, tmp_path/o)
    (tmp_path/'a.v1'/'labels.csv').rename(tmp_path/'a.v1'/'mine.csv')
    assert [name(tmp_path/o) for o in ('a.v2','a.v2/labels.csv','a.v1/mine.csv')]==['a.v2','a.v2','mine']

def test_sweep_is_handed_on(monkeypatch, capsys):
    sweep = lambda *args, **kwargs: (args, kwargs)
    monkeypatch.setitem(sys.modules, 'kdnb.sweep', SimpleNamespace(sweep=sweep))
    text = said(capsys, 0, 'sweep', 'grid.toml', '--storage', 'journal.log', '--workers', 2, '--quiet')
    assert "'journal.log'" in text and "'workers': 2" in text and "'show': False" in text

def test_help_teaches_and_is_quick():
    code = '''import sys; from kdnb.cli import main
for argv in (['--help'], ['compress','--help'], ['compress','--recipe','vid','--help'], ['report','--help'], ['data','--help'], ['sweep','--help'], ['export','--help'], ['compress','--epochs','x']):
    try: main(argv)
    except SystemExit: pass
assert not {'torch','numpy','matplotlib'} & {*sys.modules}'''
    from kdnb.recipes.registry import shipped
    res = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    for o in (*shipped, '--n-per-class', 'Training images a class', 'labels.csv', 'kdnb compress --data', '--seeds', 'goes on where it stopped', 'KDNB_DATA'): assert o in res.stdout
    assert max(map(len, command._help.splitlines()+command._compress_help.splitlines()))<=120

def test_a_size_is_for_image_sets_too():
    for size,shape in ((None,(1,8,8)), ((4,4),(1,4,4))):
        dls,name = commands._load_data(SimpleNamespace(data='digits', size=size, bs=None, pad=0, flip=False, model=None))
        assert dls.in_shape==shape and name=='digits'

def test_a_trained_network_to_a_budget(run, photos, capsys, tmp_path):
    "`--to` cuts it, `--epochs` teaches what is left, and all of the limits hold"
    argv = ['compress','--model',run[0],'--data',photos,'--to','macs=.5','params=40k','--epochs','1','--out',tmp_path/'half','--quiet']
    assert 'sensitivity, macs 0.5, params 40k' in said(capsys, 0, *argv)
    dense,small = (load_model(o/'model.safetensors') for o in (run[0], tmp_path/'half'))
    x = torch.zeros(1, 1, 8, 8)
    assert 0<macs(small, x)['']<=.5*macs(dense, x)[''] and n_params(small)<=40_000
    r = Record(tmp_path/'half')
    assert [o['name'] for o in r.stages]==['dense','sensitivity, macs 0.5, params 40k'] and (tmp_path/'half'/'report.html').exists()
    for more,says in ((['--recipe','prue'], '--to is what the recipe budget takes'), (['--to','ms=3'], '--to is'), (['--teacher','lenet5'], '--model is the network'),
                      (['--model',tmp_path/'none.safetensors'], 'none.safetensors')):
        assert says in said(capsys, 1, *argv, *more)
    assert 'apart, the images show 0, 1' in said(capsys, 1, 'compress','--model',run[0],'--to','macs=.5')
