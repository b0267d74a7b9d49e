"Evidence: grids, rows and the tables that are computed from them"
import json, os, shutil, time
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from execnb.shell import CaptureShell
from fastcore.nbio import read_nb
from fastcore.xtras import dict2obj
from elsewhere import elsewhere,start
from kdnb.evidence import MissingRows
from kdnb.evidence.tables import Verdict,printed,read_rows,spread,verdict,with_rows
from kdnb.evidence.rows import add_rows,all_grids,per_seed,results_folder,rows_file,stored_rows
from kdnb.evidence.work import gather,rounds,state_of,work_through
from kdnb.evidence import work
from kdnb.sweep import worker
from kdnb.sweep.grid import Grid
ROOT = Path(__file__).resolve().parents[1]

RESULTS = ROOT/'results'
GRID = '''
recipe = "sweep_recipes:steady"
imports = ["sweep_recipes"]
data = "digits"
priority = {priority}
[settings]
steps = {steps}
[grid]
lam = {lams}
seeds = [0,1]
'''

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), str(ROOT/'tests')]))
    def put(table, lams=(.1,.2), priority=0, steps=1, paper='p'):
        f = tmp_path/'results'/paper/f'{table}.toml'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(GRID.format(lams=list(lams), priority=priority, steps=steps))
        return tmp_path/'results'
    return put

def test_the_first_seed_of_all_grids_comes_before_the_second(folder):
    folder('b', priority=1)
    path = folder('a', [.3], priority=2)
    assert [(o[1], o[3]) for o in rounds(all_grids(path))]==[('b',2), ('a',1), ('b',4), ('a',2)]

def test_rows_are_made_once_and_know_where_they_come_from(folder, tmp_path):
    path = folder('a')
    work_through(path, tmp_path/'runs', show=False)
    rows = stored_rows('p', path)
    assert len({o['key'] for o in rows})==4 and {o['table'] for o in rows}=={'a'} and {o['seed'] for o in rows}=={0,1}
    assert {'lam','cell','test_accuracy','nonzero','device','versions','commit','trial'}<=rows[0].keys()
    before = rows_file('p', path).read_bytes()
    work_through(path, tmp_path/'elsewhere', show=False)     # a fresh clone: no runs, but rows
    assert rows_file('p', path).read_bytes()==before and not (tmp_path/'elsewhere'/'p'/'a').exists()

@pytest.mark.long
def test_two_at_once_share_the_work_and_one_is_killed(folder, tmp_path):
    path = folder('a', [.1,.2,.3,.4], steps=5)
    a,b = (start(work_through, path, tmp_path/'runs', show=False) for _ in range(2))
    for _ in range(600):
        if stored_rows('p', path): break
        time.sleep(.1)
    a.kill()
    a.join(), b.join()
    work_through(path, tmp_path/'runs', show=False)      # what the other could not take over
    rows = stored_rows('p', path)
    assert len({(o['key'], o['cell']) for o in rows})==len(rows) and len({o['key'] for o in rows})==8

@pytest.mark.long
def test_it_stops_when_the_time_is_over_and_goes_on(folder, tmp_path):
    path = folder('a', [.1,.2], steps=400)      # of .05 s each: a trial takes 20 s
    start = time.time()
    work_through(path, tmp_path/'runs', until=start+3, show=False)
    assert time.time()-start<8 and not stored_rows('p', path)
    trials = list((tmp_path/'runs'/'p'/'a').glob('*'))
    assert trials      # something was begun

def test_what_has_failed_is_tried_again_by_the_next_call(folder, tmp_path, monkeypatch, capsys):
    path = folder('a', [-.1])
    work_through(path, tmp_path/'runs')
    assert 'has failed: ValueError: lam is -0.1' in capsys.readouterr().out
    def begun(): return (tmp_path/'runs'/'p'/'a'/'log.txt').read_text().count('begin')
    assert begun()==2
    work_through(path, tmp_path/'runs', show=False)
    assert begun()==2      # not by the same call
    monkeypatch.setattr(work, 'keep_alive', lambda *args, **kwargs: work_through(path, tmp_path/'runs', show=False))
    gather(path=path, out=tmp_path/'runs')
    assert begun()==4

def test_a_table_without_a_complete_seed_is_refused(folder):
    path = folder('a')
    keys = list(Grid(path/'p'/'a.toml').combinations())
    row = dict(paper='p', table='a', cell='x', seed=0, test_accuracy=.5, device='cpu')
    add_rows('p', [row | dict(key=keys[0])], path)
    with pytest.raises(MissingRows, match='0.2.*has not been run, and 2 more'): read_rows('p', 'a', path)
    add_rows('p', [row | dict(key=keys[1]), row | dict(key=keys[2], seed=1)], path)
    assert read_rows('p', 'a', path).key.tolist()==keys[:2]      # of seed 1 a trial is missing
    assert state_of(path).iloc[0].tolist()==['p','a','any',3,4,'0']

def test_a_table_that_is_missing_says_so(folder, capsys):
    path = folder('a')
    assert with_rows('p', 'a', len, path) is None and 'not run yet: p/a has no complete seed' in capsys.readouterr().out
    row = dict(paper='p', table='a', cell='x', seed=0, epochs=3, test_accuracy=.5, device='cpu')
    add_rows('p', [row | dict(key=k) for k in Grid(path/'p'/'a.toml').combinations()], path)
    assert with_rows('p', 'a', len, path)==4 and 'a: seed 0; 3 epochs; cpu' in capsys.readouterr().out

def test_what_a_grid_asks_for_may_change_while_its_runs_stay(folder, tmp_path):
    path = folder('a', [.1])
    (path/'p'/'own.py').write_text('from sweep_recipes import steady as other')
    work_through(path, tmp_path/'runs', show=False)
    f = path/'p'/'a.toml'
    f.write_text(f.read_text().replace('sweep_recipes:steady', 'own.py:other'))
    with pytest.raises(MissingRows): read_rows('p', 'a', path)
    work_through(path, tmp_path/'runs', show=False)
    assert len(read_rows('p', 'a', path))==4 and len(stored_rows('p', path))==8

@pytest.mark.long
def test_a_folder_copied_in_the_middle_of_a_trial_goes_on(folder, tmp_path, monkeypatch):
    "Nobody runs the trial here, and its lock is not the one that the journal knows"
    path = folder('a', [.1], steps=40)
    work_through(path, tmp_path/'runs', until=time.time()+1, show=False)
    journal = tmp_path/'runs'/'p'/'a'/'journal.log'
    begun = journal.read_text().count('"state":0')
    p = start(work_through, path, tmp_path/'runs', show=False)
    for _ in range(600):
        if journal.read_text().count('"state":0')>begun: break
        time.sleep(.1)
    p.kill(), p.join()
    shutil.copytree(tmp_path/'runs', tmp_path/'copy')
    monkeypatch.setattr(worker, '_patience', 1.)
    work_through(path, tmp_path/'copy', show=False)
    assert len({o['key'] for o in stored_rows('p', path)})==2

def test_a_failure_is_told_once_and_stops_nothing_else(folder, tmp_path, capsys):
    path = folder('a', [-1,.2])
    work_through(path, tmp_path/'runs', show=False)
    said = capsys.readouterr().out.splitlines()
    assert len(said)==2 and all('has failed: ValueError: lam is -1' in o for o in said) and 'seeds=0' in said[0] and 'seeds=1' in said[1]
    assert {o['lam'] for o in stored_rows('p', path)}=={.2}

def test_without_the_process_that_started_it_a_worker_ends(folder, tmp_path):
    path = folder('a')
    work_through(path, tmp_path/'runs', show=False, parent=os.getppid()+1)
    assert not stored_rows('p', path) and not (tmp_path/'runs').exists()

@pytest.mark.parametrize('line', [b'{"table": "a", "ke', b'<<<<<<< HEAD', b'[1]', b'{"cell": "x"}', b'\xff\xfe'])
def test_a_line_that_is_no_row_is_named(line, folder):
    path = folder('a')
    rows_file('p', path).write_bytes(b'{"table": "a", "key": "1"}\n'+line)
    for f in (lambda: stored_rows('p', path), lambda: read_rows('p', 'a', path), lambda: gather(path=path)):
        with pytest.raises(ValueError, match='rows.jsonl has no row in line 2'): f()

def test_a_line_ends_where_it_was_ended(folder):
    rows = [dict(table='a', key=str(i), note=f'a{c}b') for i,c in enumerate('\u2028\x85\x0c\n')]
    path = folder('a')
    for o in rows: add_rows('p', [o], path)
    assert stored_rows('p', path)==rows

@pytest.mark.parametrize('seeds,of', [('', [0]), ('seeds = [[0,1]]', [None]), ('seeds = [3,4]', [3,4]), ('seeds = [[3],[4,5]]', [3,None])])
def test_seeds_in_every_form(seeds, of, folder):
    path = folder('a')
    f = path/'p'/'a.toml'
    f.write_text(f.read_text().replace('seeds = [0,1]', seeds))
    grid = all_grids(path)['p','a']
    assert [*per_seed(grid)]==of
    add_rows('p', [dict(table='a', key=k) for k in grid.combinations()], path)
    assert state_of(path).seeds.item()==', '.join('several' if o is None else str(o) for o in of)

@pytest.mark.parametrize('wrong,says', [
    (dict(minutes='60'), "minutes is '60'"), (dict(minutes=-1), 'minutes is -1'), (dict(jobs=0), 'jobs is 0'), (dict(jobs=1.5), 'jobs is 1.5'),
    (dict(papers=['p','q']), "papers is 'q', expected 'p'")])
def test_wrong_wishes_are_refused_before_anything_starts(wrong, says, folder, tmp_path):
    with pytest.raises(ValueError, match=says): gather(path=folder('a'), out=tmp_path/'runs', **wrong)
    assert not (tmp_path/'runs').exists()

def test_what_is_wrong_with_a_grid_is_said_with_its_name(folder):
    path = folder('a')
    for text,says in [('recipe = "x', 'not TOML'), (GRID.format(priority=0, steps=1, lams=[1])+'[more]', 'has no .more')]:
        (path/'p'/'b.toml').write_text(text)
        for f in (lambda: gather(path=path), lambda: read_rows('p', 'b', path)):
            with pytest.raises(ValueError, match=f'b.toml.*{says}'): f()
    with pytest.raises(FileNotFoundError, match='c.toml. There are p/a, p/b'): read_rows('p', 'c', path)
    with pytest.raises(FileNotFoundError, match='no grid'): gather(path=path/'p')

@pytest.mark.parametrize('d,printed,holds,words', [
    ([.006,.004,.005], .7, True, '+0.50 ± 0.10 points over 3 seeds (5.0 spreads), printed +0.70: same direction.'),
    ([-.006,-.004,-.005], .7, False, 'opposite'), ([-.006,-.004,-.005], -.7, True, 'same'), ([-.006,-.004,-.005], None, False, 'worse'),
    ([.1,.1,.1], .7, True, '+10.00 ± 0.00 points over 3 seeds (the same with every seed)'), ([0.,0.,0.], .7, None, '(0.0 spreads)'),
    ([.02,-.02,.001], .7, None, 'no difference'), ([.02], .7, None, 'one seed')])
def test_verdicts(d, printed, holds, words):
    v = verdict(d, printed)
    assert v.holds is holds and words in repr(v)

def test_printed_results_are_all_there():
    assert len(pd.read_csv(RESULTS/'papers.csv'))==981
    df = printed('PrUE', 'Table 3')
    assert df[df.method=='vanilla'].value.tolist()[0]==87.56
    with pytest.raises(ValueError, match="no 'Table 99'"): printed('PrUE', 'Table 99')
    with pytest.raises(ValueError, match='There are prune-then-distill, .*VBGS-KD'): printed('nobody')

def test_every_row_belongs_to_a_grid():
    keys = {k: {*g.combinations()} for k,g in all_grids(RESULTS).items()}
    for paper in {p for p,_ in keys}:
        for o in stored_rows(paper, RESULTS): assert o['key'] in keys[paper,o['table']], (paper, o['table'], o['trial'])

def has_rows(f): return '.ipynb_checkpoints' not in f.parts and '"#| rows' in f.read_text(encoding='utf-8')

def _run(folder, sources):
    "Outputs of cells, in the order in which they run, as a kernel in `folder` would store them"
    os.chdir(folder)
    pd.set_option('display.max_columns', 20)      # pandas has it so where a kernel imports it
    plt.close('all')      # figures of the process that it comes from
    shell = CaptureShell()
    res = []
    for o in sources:
        res.append(dict2obj(shell.run(o)))
        if shell.exc: raise shell.exc
    return res

@pytest.mark.parametrize('name', sorted(str(f.relative_to(ROOT)) for f in (ROOT/'nbs').rglob('*.ipynb') if has_rows(f)))
def test_a_stored_table_is_what_its_rows_say(name):
    nb = read_nb(ROOT/name)
    code = [c for c in nb.cells if c.cell_type=='code']
    first = next(i for i,c in enumerate(code) if c.source.startswith('#| rows'))
    imports = [c for c in code[:first] if 'import *' in c.source]
    stored = [c for c in code if c.source.startswith('#| rows')]
    now = elsewhere(_run, (ROOT/name).parent, [c.source for c in imports+stored])[len(imports):]
    for c,new in zip(stored, now, strict=True): assert _texts(new)==_texts(c.outputs), c.source

def _texts(outputs):
    "What a cell prints, and what it displays; a picture stands for itself. How printing falls into pieces is the kernel's affair."
    text = lambda o: o if isinstance(o, str) else ''.join(o)
    printed = ''.join(text(o.text) for o in outputs if o.output_type=='stream' and o.name=='stdout')
    return printed, ['picture' if 'image/png' in o.data else text(o.data['text/plain']) for o in outputs if 'data' in o]
