"GPU cells: each notebook's first one runs in small, what is stored was made by the runner, and the runner goes on where it was."
import importlib, time
from pathlib import Path

import pytest
from fastcore.nbio import mk_cell, mk_stream, new_nb, read_nb, write_nb
from kdnb.data.readers import _cifar10_jpeg, data_path
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope='module')
def runner():
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(ROOT/'.ci')     # its processes look there, too
        yield importlib.import_module('gpu')

NOTEBOOKS = [o for o in sorted((ROOT/'nbs').rglob('*.ipynb')) if o.name[0]!='_' and '.ipynb_checkpoints' not in o.parts and '"#| gpu' in o.read_text(encoding='utf-8')]
each = pytest.mark.parametrize('fn', NOTEBOOKS, ids=lambda o: o.name)

@each
def test_what_is_stored_was_made_by_the_runner(fn, runner):
    gpu = runner.parts(fn)[2]
    assert gpu and all(runner.stored(c) in ('', k) for c,k in zip(gpu, runner.keys(gpu))), 'run `make gpu`'

def test_they_run_only_when_asked_for(): assert 'gpu' in get_config().tst_flags.split()

@pytest.fixture(scope='module')
def decoded():
    "Once on a machine all its images are decoded: no cell's time"
    _cifar10_jpeg(data_path())

@each
@pytest.mark.mnist
def test_the_first_cell_runs_in_small(fn, runner, data_dir, decoded, monkeypatch, tmp_path):
    monkeypatch.setenv('KDNB_TINY', '1')
    monkeypatch.chdir(tmp_path)
    _,imports,gpu = runner.parts(fn)
    names,start = {'display': lambda *args: None},time.process_time()
    for c in [*imports, gpu[0]]: exec(compile(c.source, fn.name, 'exec'), names)
    assert time.process_time()-start<30

def _notebook(fn, *sources):
    kernel = dict(name='python3', display_name='python3', language='python')
    write_nb(new_nb(sources, dict(kernelspec=kernel)), fn)
    return fn

def _texts(fn): return [''.join(o.text for o in c.outputs if 'text' in o) for c in read_nb(fn).cells]

IMPORT,OTHER,A,B = 'from math import *','1/0','#| gpu\nx = pi\nprint("a")','#| gpu\nprint(round(x, 2))'

@pytest.mark.long
def test_a_run_is_stored_below_its_line_and_not_repeated(runner, tmp_path, capfd):
    fn = _notebook(tmp_path/'a.ipynb', IMPORT, OTHER, A, OTHER, B)
    assert len(runner.lacking(fn))==2 and runner.run([fn], 'H100', 1, 2) and not runner.lacking(fn)
    texts = _texts(fn)
    assert texts[:2]==['','']==texts[3:4]+[''] and texts[2].endswith('\na\n') and texts[4].endswith('\n3.14\n')
    assert all(o.startswith('Run on H100 (torch ') for o in texts[2::2]) and [*tmp_path.iterdir()]==[fn]
    runner.nbdev_clean.__wrapped__(str(fn))
    before = fn.read_bytes()
    assert runner.run([fn], 'H100', 1, 2) and fn.read_bytes()==before and _texts(fn)==texts
    assert 'a.ipynb is stored' in capfd.readouterr().out

    runner.execute(fn, None)     # without a GPU nothing changes
    assert fn.read_bytes()==before
    nb = read_nb(fn)
    nb.cells[4].source += '\n'+OTHER.replace('0', '2')
    write_nb(nb, fn)
    assert [c.source for c in runner.lacking(fn)]==[nb.cells[4].source]
    runner.execute(fn, None)
    assert _texts(fn)==texts[:4]+['not run yet\n']

@pytest.mark.long
def test_in_small_nothing_is_stored_and_faults_are_faults(runner, tmp_path, capfd):
    good,bad = _notebook(tmp_path/'good.ipynb', IMPORT, A, B),_notebook(tmp_path/'bad.ipynb', A)
    assert not runner.run([good,bad], None, 5, 2)
    assert _texts(good)==['','not run yet\n','not run yet\n'] and _texts(bad)==['']
    out,err = capfd.readouterr()
    assert 'good.ipynb run in' in out and 'in small' in out and 'bad.ipynb FAILED' in out and "name 'pi' is not defined" in err

@pytest.mark.long
def test_it_stops_when_the_time_is_over(runner, tmp_path, capfd):
    first,second = (_notebook(tmp_path/f'{o}.ipynb', '#| gpu\nimport time; time.sleep(60)') for o in 'ab')
    before,start = [o.read_bytes() for o in (first,second)],time.perf_counter()
    assert runner.run([first,second], 'H100', 4/60, 1) and time.perf_counter()-start<12
    out = capfd.readouterr().out
    assert 'a.ipynb not finished' in out and 'b.ipynb not begun' in out and [o.read_bytes() for o in (first,second)]==before

def test_an_output_of_another_hand_is_seen(runner):
    def cell(*texts): return mk_cell('#| gpu', outputs=[mk_stream('stdout', o) for o in texts])
    line = 'Run on NVIDIA H100 (torch 2.11.0) on 2026-11-27, 31 s, cells 0123abcd\n'
    assert [runner.stored(o) for o in (cell('not run yet\n'), cell(line, 'x'), cell(line+'x'), cell(), cell('x'), cell('x', line), cell('not run yet\n', 'x'))] \
        ==['','0123abcd','0123abcd',None,None,None,None]
