"Sweeps: nothing runs twice and nothing gets lost, whoever dies; wrong grids are refused; the Pareto front is exact."
import multiprocessing, os, random, signal, subprocess, sys, threading, time
from collections import Counter

import kdnb.sweep.storage as shared, kdnb.sweep.trial as trial, kdnb.sweep.worker as sw
import pytest
from elsewhere import Worker
from kdnb.all import *
from kdnb.sweep import *
from optuna.trial import TrialState

fork = multiprocessing.get_context('fork')
sw._open('sqlite://')     # what a database needs is imported here, once, and not in every fork

def grid(lams=(.1,.2,.3,.4), seeds=(0,1), **settings):
    return dict(recipe='sweep_recipes:steady', data='digits', settings=settings, grid=dict(lam=list(lams), seeds=list(seeds)))

forks = []
@pytest.fixture
def quick(monkeypatch):
    "Look often, and never load data; no worker outlives its test"
    monkeypatch.setattr(sw, '_nap', .05)
    monkeypatch.setattr(sw.gc, 'collect', lambda: 0)
    monkeypatch.setattr(Grid, 'dls', lambda self: None)
    yield
    while forks: forks.pop().kill()

def _work(g, storage, out): sw._Worker(Grid(g), storage, out, show=False).work()

def start(*args, init=None):
    "A worker in a process of its own"
    def target():
        if init: init()
        _work(*args)
    forks.append(p := fork.Process(target=target))
    p.start()
    return p

def log(out):
    f = out/'log.txt'
    return [o.split() for o in f.read_text().splitlines()] if f.exists() else []

def until(f, timeout=60):      # a lock whose holder was killed is broken after half a minute
    end = time.monotonic()+timeout
    while not (o := f()):
        assert time.monotonic()<end, 'it takes too long'
        time.sleep(.01)
    return o

def put_to_sleep(p, storage):
    "Stop `p` when nobody holds the journal's lock: others would break it, and `p` wake up in the middle of writing"
    while True:
        os.kill(p.pid, signal.SIGSTOP); os.waitpid(p.pid, os.WUNTRACED)
        if not os.path.lexists(f'{storage}.lock'): return
        os.kill(p.pid, signal.SIGCONT)
        time.sleep(.01)

def counts(out, word): return Counter(o[0] for o in log(out) if o[1]==word)
def names(g): return {name for name,_ in Grid(g).combinations().values()}
def all_done_once(g, out, twice=()):
    "Every step of every trial was made once, every trial was ended once, and only `twice` was begun more than once"
    assert counts(out, 'end')==dict.fromkeys(names(g), 1)
    assert set(counts(out, 'step').values())=={4}
    assert {k for k,v in counts(out, 'begin').items() if v>1}<=set(twice)

storages = pytest.mark.parametrize('storage', ['{}/journal.log','sqlite:///{}/sweep.db'], ids=['journal','sqlite'])

@pytest.mark.long
@storages
def test_two_workers_share_and_one_is_killed(quick, tmp_path, storage):
    g,args = grid(),(grid(), storage.format(tmp_path), tmp_path)
    a,b = start(*args),start(*args)
    until(lambda: any(o[1]=='step' and o[2]=='1' and o[0] in running(a, tmp_path) for o in log(tmp_path)))
    os.kill(a.pid, signal.SIGKILL)
    a.join()
    victim = running(a, tmp_path)
    b.join()
    assert b.exitcode==0 and len(victim)==1
    all_done_once(g, tmp_path, victim)
    assert not [o for o in log(tmp_path) if o[0] in victim and o[1]=='begin'][1][2]=='0'    # it went on in the middle
    r = sweep(*args, workers=0)
    assert (r.trials.state=='finished').all() and len(r.table())==4 and (r.table().n==2).all()

def running(p, out):
    "What the process `p` had begun and not ended"
    mine = [o for o in log(out) if o[1] in ('begin','end') and o[-1]==str(p.pid)]
    return {o[0] for o in mine if o[1]=='begin'}-{o[0] for o in mine if o[1]=='end'}

def test_whoever_dies_at_whatever_moment(quick, tmp_path):
    g,rng = grid(lams=(.1,.2,.3), pause=.03),random.Random(0)
    args = g,tmp_path/'journal.log',tmp_path
    for _ in range(5):
        ps = [start(*args) for _ in range(2)]
        time.sleep(rng.uniform(.05, .4))
        for p in ps: p.kill(); p.join()
    start(*args).join()
    r = sweep(*args, workers=0)
    assert (r.trials.state=='finished').all()
    assert counts(tmp_path, 'step')==dict.fromkeys(names(g), 4)
    now = sw._Worker(Grid(g), *args[1:]).study.trials
    assert Counter(t.state for t in now)[TrialState.COMPLETE]==len(names(g)) and not any(t.state==TrialState.RUNNING for t in now)

def test_a_lock_that_a_dead_worker_left_on_the_journal_holds_up_nobody(quick, tmp_path):
    path = tmp_path/'journal.log'
    study = sw._open(path).create_new_study([1], 'a')
    def die():
        s = sw._open(path)
        s._backend._lock.acquire()
        path.open('a').write('{"op_code":4,"half of a li')
        os.kill(os.getpid(), signal.SIGKILL)
    p = fork.Process(target=die)
    p.start(); p.join()
    assert (tmp_path/'journal.log.lock').exists()
    begin,s = time.monotonic(),sw._open(path)
    s.create_new_trial(study)
    assert time.monotonic()-begin<10 and len(sw._open(path).get_all_trials(study))==1
    assert not (tmp_path/'journal.log.lock').exists()
    (tmp_path/'journal.log.lock').write_text('a lock on another machine')
    q = fork.Process(target=lambda: s.create_new_trial(study))
    q.start()
    q.join(2)
    assert q.is_alive()            # that one is waited for
    (tmp_path/'journal.log.lock').unlink()
    q.join()
    assert len(s.get_all_trials(study))==2

def test_a_worker_that_dies_as_soon_as_it_has_its_trial(quick, tmp_path, monkeypatch):
    g = grid(lams=[.1], seeds=[0], pause=0.)
    def die():
        from optuna.storages import JournalStorage
        monkeypatch.setattr(JournalStorage, 'set_trial_user_attr', lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    p = start(g, tmp_path/'journal.log', tmp_path, init=die)
    p.join()
    assert p.exitcode==-9 and not log(tmp_path)
    p = start(g, tmp_path/'journal.log', tmp_path)
    p.join(20)
    assert p.exitcode==0
    all_done_once(g, tmp_path)

@pytest.mark.long
@storages
def test_workers_that_start_together_add_each_trial_once(quick, tmp_path, storage):
    g = grid(lams=[i/100 for i in range(12)], seeds=(0,), pause=0.)
    args = g,storage.format(tmp_path),tmp_path
    ps = [start(*args) for _ in range(3)]
    for p in ps: p.join()
    assert not any(p.exitcode for p in ps)
    all_done_once(g, tmp_path)
    assert len(sw._Worker(Grid(g), *args[1:]).study.trials)==12

@pytest.mark.long
@storages
def test_a_trial_is_taken_by_one_only_without_any_lock(quick, tmp_path, storage, monkeypatch):
    "Four workers see the same trials as free; each has a folder of its own, so the storage alone decides"
    g,storage = grid(lams=[.1,.2], pause=0.),storage.format(tmp_path)
    sw._Worker(Grid(g), storage, tmp_path).add()
    def slow():
        if '://' not in storage: return
        from optuna.storages import RDBStorage
        look = RDBStorage.check_trial_is_updatable
        monkeypatch.setattr(RDBStorage, 'check_trial_is_updatable', lambda *o: (look(*o), time.sleep(.03)))
    ps = [start(g, storage, tmp_path/str(i), init=slow) for i in range(4)]
    for p in ps: p.join()
    ends = Counter(o[0] for i in range(4) for o in log(tmp_path/str(i)) if o[1]=='end')
    assert ends==dict.fromkeys(names(g), 1)

@pytest.mark.long
def test_another_machine_waits_for_the_count_to_stand_still(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, '_every', .1)
    monkeypatch.setattr(sw, '_patience', 2.)
    g,storage = grid(lams=[.5], seeds=[0], steps=90),tmp_path/'journal.log'
    here,there = tmp_path/'here',tmp_path/'there'
    a = start(g, storage, here)
    until(lambda: counts(here, 'step').total()>2)
    b = start(g, storage, there, init=lambda: monkeypatch.setattr(shared, '_kernel', lambda: 'another'))
    until(lambda: counts(here, 'step').total()>52)     # 50 steps of .05 s at work: it is not taken for dead
    assert not log(there)
    put_to_sleep(a, storage)
    until(lambda: counts(there, 'begin'))
    os.kill(a.pid, signal.SIGCONT)     # wakes up, sees that the trial is not its own any more, and waits for the other
    a.join(); b.join()
    assert (a.exitcode,b.exitcode)==(0,0) and not counts(here, 'end') and counts(there, 'end').total()==1

def test_on_the_same_machine_a_sleeper_keeps_its_trial(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(sw, '_patience', .2)
    g = grid(lams=[.5], seeds=[0])
    a = start(g, tmp_path/'journal.log', tmp_path)
    until(lambda: counts(tmp_path, 'step'))
    os.kill(a.pid, signal.SIGSTOP)
    b = start(g, tmp_path/'journal.log', tmp_path)
    time.sleep(1)
    os.kill(a.pid, signal.SIGCONT)
    a.join(); b.join()
    all_done_once(g, tmp_path)

def test_a_trial_that_kills_its_process_is_given_up(quick, tmp_path):
    g = grid(lams=[.1,2.], seeds=[0])
    args = g,tmp_path/'journal.log',tmp_path
    for _ in range(sw._lives): start(*args).join()
    p = start(*args)
    p.join()
    r = sweep(*args, workers=0)
    assert p.exitcode==0 and list(r.trials.state)==['finished','failed']
    assert r.trials.error[1]=='Its process was killed 5 times.' and counts(tmp_path, 'begin').total()==1+sw._lives

def test_kills_after_which_a_run_got_further_do_not_add_up(quick, tmp_path):
    g = grid(lams=[2.], seeds=[0], lives=sw._lives+2)
    args = g,tmp_path/'journal.log',tmp_path
    for _ in range(sw._lives+2): start(*args).join()
    assert list(sweep(*args, workers=0).trials.state)==['left']
    start(*args).join()
    assert list(sweep(*args, workers=0).trials.state)==['finished']

def test_of_equal_attempts_the_first_counts(quick, tmp_path):
    w = sw._Worker(Grid(grid(lams=[.1], seeds=[0])), tmp_path/'journal.log', tmp_path)
    w.add()
    first, = w.study.trials
    w.study.add_trial(first)
    assert len(w.study.trials)==2 and [t.number for t in w.current().values()]==[0]
    w.work()
    assert [t.state for t in w.study.trials]==[TrialState.COMPLETE,TrialState.WAITING] and counts(tmp_path, 'begin').total()==1

def test_ctrl_c_hands_the_trial_back(quick, tmp_path):
    g = grid(lams=[.1], seeds=[0])
    for _ in range(sw._lives+2):
        p = start(g, tmp_path/'journal.log', tmp_path, init=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        n = len(log(tmp_path))
        until(lambda: len(log(tmp_path))>n)
        os.kill(p.pid, signal.SIGINT)
        p.join()
    _work(g, tmp_path/'journal.log', tmp_path)
    assert counts(tmp_path, 'step').total()==4 and counts(tmp_path, 'end').total()==1

def test_failures_are_kept_and_tried_again_when_asked(quick, tmp_path, capsys):
    g = grid(lams=[-1,.5], seeds=[0], pause=0.)
    args = g,tmp_path/'journal.log',tmp_path
    r = sweep(*args)
    assert 'expected a fraction' in capsys.readouterr().out and 'expected a fraction' in repr(r)
    assert list(r.trials.state)==['failed','finished'] and r.trials.error[0].startswith('ValueError: lam is -1')
    bad = r.trials['name'][0]
    sweep(*args, show=False)
    assert counts(tmp_path, 'begin')[bad]==1
    sweep(*args, show=False, retry_failed=True)
    assert counts(tmp_path, 'begin')==dict(zip(r.trials['name'], (2,1)))
    text = (tmp_path/'sweep.html').read_text()
    assert 'What failed' in text and 'expected a fraction' in text

def test_text_is_escaped(quick, tmp_path):
    g = dict(recipe='sweep_recipes:steady', data='digits', settings=dict(pause=0.), grid=dict(lam=[-1,.5], steps=[4], epochs=['<b>"&']))
    page = str(sweep(g, tmp_path/'journal.log', tmp_path, show=False).page())
    assert 'What failed' in page and '<svg' in page and '<b>' not in page and '&lt;b&gt;' in page and '&amp;lt;' not in page

def test_a_grid_may_grow_and_shrink(quick, tmp_path):
    run = lambda g: sweep(g, tmp_path/'journal.log', tmp_path, show=False)
    run(grid(lams=[.1,.2], pause=0.))
    r = run(grid(lams=[.2,.3], pause=0))                  # 0 is 0.
    assert len(r)==4 and list(r.table().index.get_level_values('lam'))==[.2,.3] and (r.trials.state=='finished').all()
    assert counts(tmp_path, 'begin').total()==6 and set(counts(tmp_path, 'begin').values())=={1}
    moved = grid(lams=[.1], pause=0.)
    del moved['grid']['lam']; moved['settings']['lam'] = .1     # from [grid] to [settings]
    assert len(run(moved))==2 and counts(tmp_path, 'begin').total()==6
    with pytest.raises(ValueError, match='holds a sweep .sweep. of sweep_recipes:steady on digits'): run(moved|dict(data='mnist'))
    run(moved|dict(data='mnist', name='other'))

def test_the_table_is_the_mean_over_seeds(quick, tmp_path):
    r = sweep(grid(lams=[.5,.6], seeds=(0,1,2), pause=0.), tmp_path/'journal.log', tmp_path, show=False)
    t = r.table()
    assert list(t.index)==[(.5,'small'),(.6,'small')] and np.allclose(t.test_accuracy, [.26,.31]) and np.allclose(t.spread, .01)
    assert np.allclose(r.table('big').test_accuracy, [.51,.61]) and len(r.stages)==12
    assert list(t.pareto)==[False,True]
    both = sweep(dict(recipe='sweep_recipes:steady', data='digits', settings=dict(seeds=3, pause=0.), grid=dict(lam=[.5])),
                 tmp_path/'journal.log', tmp_path, show=False)      # the seeds in one run instead
    assert np.allclose(both.table()[['n','test_accuracy','spread']], [[3,.26,.01]])
    assert pd.read_csv(tmp_path/'sweep.csv').test_accuracy[0]==pytest.approx(.26)
    with pytest.raises(ValueError, match="no stage 'tiny'. There are big, small"): r.table('tiny')
    with pytest.raises(ValueError, match="no 'size'"): r.plot('size')

def test_a_grid_over_what_stages_have_too(quick, tmp_path):
    g = dict(recipe='sweep_recipes:steady', data='digits', settings=dict(pause=0.), grid=dict(epochs=[[1,2],[3]], weights=[5,7]))
    t = sweep(g, tmp_path/'journal.log', tmp_path, show=False).table()
    assert list(t.index)==[(e, w, 'small') for e in ('1-2','3') for w in (5,7)] and set(t.weights)=={1000}
    assert '<td>1-2</td>' in (tmp_path/'sweep.html').read_text()

wrongs = [(dict(recipe='magic'), "no recipe 'magic'"), (dict(recipe='sweep_recipes:magic'), 'no recipe sweep_recipes:magic'),
          (dict(grid=dict(lam=[])), 'expected a list'), (dict(grid=dict(lam=.5)), 'expected a list'), (dict(grid=dict(lamda=[1])), "no 'lamda'"),
          (dict(settings=dict(path='x')), "no 'path'"), (dict(settings=dict(lam=1)), 'in .settings. and in .grid.'),
          (dict(gird={}), "no 'gird'"), (dict(data='no such set'), 'no such set'), (dict(loaders=dict(bs=0, siez=3)), 'siez'),
          (dict(grid=dict(teacher=[nn.Linear(1,1)])), 'plain data'), (dict(grid=[1]), 'table'), (dict(data=3), 'text')]
@pytest.mark.parametrize('change,says', wrongs, ids=[str(i) for i in range(len(wrongs))])
def test_wrong_grids_are_refused_before_anything_starts(tmp_path, change, says):
    with pytest.raises((ValueError,TypeError), match=says): sweep(grid()|change, tmp_path/'journal.log', tmp_path/'out', show=False)
    assert not log(tmp_path/'out')

OWN = '''
from types import SimpleNamespace
def mine(dls, path, lam=.5): return SimpleNamespace(stages=[dict(name='s', seed=0, test_accuracy=lam, weights=1)])
def other(dls, path, **settings): return mine(dls, path, settings['lam']*2)
'''

@pytest.mark.parametrize('recipe,imports', [('own_sweep.py:mine', []), ('own_sweep:other', ['own_sweep.py']), ('own_sweep.py:other', [])])
def test_a_recipe_of_one_s_own_file(recipe, imports, quick, tmp_path, monkeypatch):
    "It takes what it takes, also without a display, seeds and the name of the data"
    (tmp_path/'own_sweep.py').write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, 'own_sweep', raising=False)
    g = dict(recipe=recipe, data='digits', imports=imports, grid=dict(lam=[.1,.2]))
    r = sweep(g, 'journal.log', tmp_path, show=False)
    assert [*r.table().test_accuracy]==([.1,.2] if 'mine' in recipe else [.2,.4])
    if 'mine' in recipe:
        with pytest.raises(ValueError, match="no 'lamda'"): Grid(g | dict(grid=dict(lamda=[1])))

def test_own_code_is_found_beside_the_grid_s_file(quick, tmp_path, monkeypatch):
    (tmp_path/'grids').mkdir()
    (tmp_path/'grids'/'beside_sweep.py').write_text(OWN)
    (tmp_path/'grids'/'g.toml').write_text('recipe = "beside_sweep.py:mine"\nimports = ["beside_sweep.py"]\ndata = "digits"\n[grid]\nlam = [0.1]')
    monkeypatch.chdir(tmp_path)
    assert [*sweep('grids/g.toml', 'journal.log', tmp_path, show=False).table().test_accuracy]==[.1]

def test_the_first_of_a_sweep_are_all_of_the_first_seed(quick, tmp_path):
    r = sweep(grid(pause=0.), tmp_path/'journal.log', tmp_path, show=False, first=5)
    assert [*r.trials.state]==['finished']*5+['left']*3 and [*r.trials.seeds]==['0']*4+['1']*4

@pytest.mark.long
def test_a_sweep_stops_when_the_time_is_over_and_goes_on(quick, tmp_path):
    g = grid([.1,.2], [0], steps=60)      # 3 s each
    r = sweep(g, tmp_path/'journal.log', tmp_path, show=False, minutes=1.5/60)
    assert [*r.trials.state]==['left','left'] and 0<counts(tmp_path, 'step').total()<60
    r = sweep(g, tmp_path/'journal.log', tmp_path, show=False)
    assert [*r.trials.state]==['finished']*2
    assert counts(tmp_path, 'step')==dict.fromkeys(names(g), 60)      # none was made twice
    with pytest.raises(ValueError, match='above 0'): sweep(g, tmp_path/'journal.log', tmp_path, minutes=0)
    with pytest.raises(ValueError, match='from 1 on'): sweep(g, tmp_path/'journal.log', tmp_path, first=0)

def test_the_picture_is_in_the_colours_of_the_page(quick, tmp_path):
    sweep(grid(pause=0.), tmp_path/'journal.log', tmp_path, show=False)
    svg = (tmp_path/'sweep.html').read_text().split('<svg')[1]
    assert '#ffffff' not in svg and 'Pareto front' in svg and 'currentColor' in svg

def test_a_finished_trial_s_folder_is_not_overwritten(quick, tmp_path, monkeypatch):
    "A trial that was finished but not written down is read; one of other data is refused, and its folder stays"
    from common import data
    g = dict(recipe='prune-then-distill', data='digits', settings=dict(teacher='lenet300', student='lenet300', sparsities=.2, pairs='alone', epochs=[1,1,1]), grid=dict(lr=[.01]))
    monkeypatch.setattr(Grid, 'dls', lambda self: data())
    run = lambda storage: sweep(g, tmp_path/storage, tmp_path/'out', show=False)
    first = run('one.log')
    folder, = [o for o in (tmp_path/'out').iterdir() if o.is_dir() and o.name[0]!='.']
    before = {o: o.read_bytes() for o in folder.rglob('*') if o.is_file()}
    assert run('two.log').table().equals(first.table())               # another journal: nothing is known of the trial
    monkeypatch.setattr(Grid, 'dls', lambda self: data(bs=32))
    failed, = run('three.log').of('failed').error
    assert 'holds a finished run' in failed and 'batches of 32, had 64' in failed
    assert {o: o.read_bytes() for o in before}==before

def test_files_that_are_no_grids(tmp_path):
    f = tmp_path/'grid.toml'
    f.write_text('recipe = "vbgs-kd"\ndata = "digits"\n[grid]\nlam = [.5]')
    with pytest.raises(ValueError, match='grid.toml is not TOML.*line 4'): Grid(f)
    f.write_text('recipe = "vbgs-kd"\ndata = "digits"\n[settings]\nepochs = [2,2,6]\n[grid]\nlam = [0.5, 1]\nstudent = ["a/b", "c"]')
    assert [o for o,_ in Grid(str(f)).combinations().values()][0].startswith('lam=0.5,student=a_b-')
    with pytest.raises(FileNotFoundError): Grid(tmp_path/'none.toml')

@pytest.mark.parametrize('url,error,words', [('postgresql+pg8000://me:secret@/x', ImportError, 'driver for postgresql.pg8000 is missing .*Install it'),
    ('nonsense://me:secret@there/x', OSError, 'database there/x cannot be used: .*nonsense'),
    ('sqlite:////nowhere/x.db', OSError, 'database sqlite:////nowhere/x.db cannot be used: .*unable to open')])
def test_a_database_that_cannot_be_used(url, error, words, tmp_path):
    with pytest.raises(error, match=words) as e: sweep(grid(), url, tmp_path)
    assert 'secret' not in str(e.value)

def test_optuna_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ImportError, match=r'kdnb\[sweep\]'): sweep(grid(), tmp_path/'journal.log', tmp_path)

@pytest.mark.parametrize('seed', range(20))
def test_pareto_is_exact(seed):
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(rng.integers(0, 6, (rng.integers(1,40),2)).astype(float), columns=['weights','test_accuracy'])
    df = df.mask(rng.random(df.shape)<.05)
    beats = lambda a,b: a.weights<=b.weights and a.test_accuracy>=b.test_accuracy and (a.weights<b.weights or a.test_accuracy>b.test_accuracy)
    rows = [o for _,o in df.iterrows()]
    want = [not b.isna().any() and not any(beats(a, b) for a in rows) for b in rows]
    assert pareto(df).tolist()==want

@pytest.mark.long
def test_processes_of_their_own_train_and_one_is_killed(tmp_path, monkeypatch, capsys):
    "Those of which one is killed are forks, which need not import anything; then one begins as `kdnb sweep` starts it"
    started,spawn = [],sw._Worker.spawn
    def spawned(self, i): started.append(p := spawn(self, i)); return p
    monkeypatch.setattr(sw._Worker, 'spawn', spawned)
    def kill():
        until(lambda: len(list(tmp_path.glob('*/run.json')))>1, 300)
        started[0].kill()
    killer = threading.Thread(target=kill)
    killer.start()
    g = dict(recipe='vbgs-kd', data='digits', settings=dict(teacher='lenet300', epochs=[1,1,2]), grid=dict(gamma_weight=[3,30,100]))
    with monkeypatch.context() as m:
        m.setattr(sw, 'worker_process', Worker)
        r = sweep(g, tmp_path/'journal.log', tmp_path, workers=2)
    killer.join()
    assert len(started)==3 and [p.wait() for p in started]==[-9,0,0]
    assert '3/3 gamma_weight=' in capsys.readouterr().out and (r.trials.state=='finished').all()
    assert list(r.table().n)==[1,1,1] and {'latency_ms','macs','valid_accuracy'}<=set(r.table().columns)
    end = Counter(t.state for t in sw._Worker(r.grid, tmp_path/'journal.log', tmp_path).study.trials)
    assert end[TrialState.COMPLETE]==3 and end[TrialState.FAIL]<=1 and end.total()==3+end[TrialState.FAIL]    # killed in a trial, or between two
    assert {o['name'] for n in r.trials['name'] for o in Record(tmp_path/n).stages}=={'teacher','student','sparse','small'}
    r.plot(size='latency_ms')

    g['grid']['gamma_weight'].append(10)
    sw._Worker(Grid(g), tmp_path/'journal.log', tmp_path).supervise(1)
    assert isinstance(started[3], subprocess.Popen) and '4/4 gamma_weight=' in capsys.readouterr().out
    assert (sweep(g, tmp_path/'journal.log', tmp_path, workers=0).trials.state=='finished').all()

def test_a_gpu_for_each_worker(quick, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(trial.subprocess, 'Popen', lambda cmd, env: seen.append(env.get('CUDA_VISIBLE_DEVICES')))
    w = sw._Worker(Grid(grid()), tmp_path/'journal.log', tmp_path)
    for n,visible in ((0,None), (1,None), (2,None), (8,'3,5')):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: n)
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False) if visible is None else monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
        for i in range(3): w.spawn(i)
    assert seen==[None]*6 + ['0','1','0','3','5','3']

def test_a_failed_run_can_be_tried_again_by_another_process(tmp_path):
    g = dict(recipe='vbgs-kd', data='digits', settings=dict(teacher='lenet300', teacher_lr=1e30, epochs=[1,1,1]), grid=dict(seeds=[0]))
    args = g,tmp_path/'journal.log',tmp_path
    assert sweep(*args, show=False).trials.error[0].startswith('FloatingPointError: ')
    p = fork.Process(target=lambda: sweep(*args, show=False, retry_failed=True))
    p.start(); p.join()
    assert sweep(*args, workers=0).trials.error[0].startswith('FloatingPointError: ')    # and not: another process is writing
