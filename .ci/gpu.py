"""Run the `#| gpu` cells of all notebooks, several notebooks at a time, and keep what they show below a line that says
where it was made. Where there is no CUDA they run in small, and keep nothing: "not run yet"."""
import argparse, hashlib, os, re, sys, time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import nbformat
from fastcore.nbio import read_nb
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbglob

from nbs import ROOT, client, keep, marked

NOT_RUN = 'not run yet\n'
LINE = re.compile(r'Run on .+ on \d{4}-\d\d-\d\d, \d+ s, cells ([0-9a-f]{8})\n')

def parts(fn):
    "The notebook `fn`, the cells that are run first, and its GPU cells"
    nb,cells = nbformat.read(fn, 4),read_nb(fn).cells
    gpu = {o.idx_ for o in cells if 'gpu' in o.directives}
    first = [nb.cells[i] for i in sorted(marked(fn, 'gpu')-gpu)]
    if any('default_exp' in o.directives for o in cells):     # what it defines above comes from the package
        first.insert(0, nbformat.v4.new_code_cell('from kdnb.all import *'))
    return nb,first,[nb.cells[i] for i in sorted(gpu)]

def keys(gpu):
    "Of each GPU cell a checksum of it and of those above"
    h = hashlib.md5()
    for c in gpu:
        h.update(c.source.encode())
        yield h.hexdigest()[:8]

def stored(cell):
    "'' if a cell shows that it was not run, the checksum of what it shows, or None if it has another output"
    first = next(iter(cell.outputs), {}).get('text', '')
    if [o.get('text') for o in cell.outputs]==[NOT_RUN]: return ''
    return m[1] if (m := LINE.match(first)) else None

def lacking(fn):
    "GPU cells of `fn` without an output of what they are now"
    gpu = parts(fn)[2]
    return [c for c,k in zip(gpu, keys(gpu)) if stored(c)!=k]

def write(nb, fn):
    "All or nothing: one that is killed here leaves the old notebook"
    tmp = fn.with_name(f'_{fn.name}')
    nbformat.write(nb, tmp)
    nbdev_clean.__wrapped__(str(tmp))
    tmp.replace(fn)

def execute(fn, device):
    "Run the GPU cells of `fn` in a kernel of their own and store what they show if this is the GPU `device`"
    nb,imports,gpu = parts(fn)
    from kdnb import __version__
    said = f'torch {version("torch")}, fastai {version("fastai")}, kdnb {__version__}'
    nbc = client(nbformat.v4.new_notebook(cells=[*imports,*gpu], metadata=nb.metadata), fn)
    with nbc.setup_kernel(cleanup_kc=True):
        for i,c in enumerate(imports): nbc.execute_cell(c, i)
        for i,(c,key) in enumerate(zip(gpu, keys(gpu)), len(imports)):
            old,start = (c.outputs if stored(c)==key else []),time.perf_counter()
            nbc.execute_cell(c, i)
            line = f'Run on {device} ({said}) on {date.today()}, {time.perf_counter()-start:.0f} s, cells {key}\n'
            new = [nbformat.v4.new_output('stream', name='stdout', text=line), *filter(keep, c.outputs)]
            c.outputs = new if device else old or [nbformat.v4.new_output('stream', name='stdout', text=NOT_RUN)]
    write(nb, fn)

def process(fn, device):
    "`execute` as a process: its exit status, and of an error the cell and the message"
    try: execute(fn, device)
    except CellExecutionError as e: sys.exit(re.sub(r'\x1b\[[\d;]*m', '', str(e)))

def run(fns, device, minutes, jobs):
    "Run `fns`, `jobs` at a time, for so many minutes; True if none of them failed"
    end = time.monotonic() + 60*minutes
    def one(fn):
        if device and not lacking(fn): said = 'is stored'
        elif (left := end-time.monotonic())<=0: said = 'not begun: the time was over'
        else:
            p = get_context('spawn').Process(target=process, args=(fn, device))
            p.start()
            p.join(left)
            late = p.is_alive()
            p.kill()     # its kernel ends when it misses it
            p.join()
            said = (f'not finished after {left:.0f} s: the time was over' if late else 'FAILED' if p.exitcode else
                    f'run in {left-(end-time.monotonic()):.0f} s' + ('' if device else ', in small'))
        print(fn.name, said, flush=True)
        return said!='FAILED'
    with ThreadPoolExecutor(jobs) as pool: return all([*pool.map(one, fns)])

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('notebooks', nargs='*', type=Path, help='default: all in nbs/ that have a GPU cell')
    p.add_argument('--minutes', type=float, default=10, help='stop then; what is stored is not run again')
    p.add_argument('--jobs', type=int, default=10, help='notebooks at a time; without a GPU at most one a core')
    a = p.parse_args()
    os.environ['PYTHONPATH'] = str(ROOT)
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    sys.path.insert(0, str(ROOT))
    from kdnb.data import tiny
    import torch
    device = None if tiny() else torch.cuda.get_device_name()
    fns = [o.resolve() for o in a.notebooks or sorted(nbglob(as_path=True))]
    fns = [o for o in fns if parts(o)[2]]
    print(f'GPU cells of {len(fns)} notebooks', f'on {device}' if device else 'in small: there is no GPU', flush=True)
    sys.exit(not run(fns, device, a.minutes, a.jobs if device else min(a.jobs, os.cpu_count())))
