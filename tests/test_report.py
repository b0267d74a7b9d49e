"The report: the numbers are those of the record, nothing is needed but the folder, and a real browser shows all of it."
import html, json, re, subprocess, sys, time
from shutil import which

import matplotlib.pyplot as plt
import pytest
from common import data
from fake import exhibits, fake_record
from kdnb.all import *
from kdnb.drawing import _in_style,_pooled
from kdnb.report.numbers import layer_rows,stage_rows,verdict

BROWSER = which('chromium') or which('chromium-browser') or which('google-chrome')
in_browser = pytest.mark.skipif(not BROWSER, reason='no chromium, chromium-browser or google-chrome on the PATH')
PROBE = '''<!doctype html>
<iframe style="width:{width}px;height:844px;border:0" srcdoc="{page}"></iframe><pre id="seen"></pre>
<script>onload = () => {{
  const win = frames[0], doc = win.document, style = o => o ? win.getComputedStyle(o) : {{}}
  document.querySelector('#seen').textContent = JSON.stringify({{
    pictures: [...doc.querySelectorAll('img, svg')].map(o => o.naturalWidth ?? o.getBoundingClientRect().width),
    excess: doc.documentElement.scrollWidth - win.innerWidth, mobile: !!doc.querySelector('meta[name=viewport]'),
    smallest: Math.min(...[...doc.querySelectorAll('svg text')].map(o => o.getBoundingClientRect().height)),
    paper: style(doc.body).backgroundColor, ink: style(doc.body).color, letters: style(doc.querySelector('svg text')).fill }})
}}</script>'''

def look(page, width, tmp_path, dark=False):
    "Show `page` in a frame of `width` pixels (no headless window is narrower than 500) and say what is seen"
    probe = tmp_path/'probe.html'
    probe.write_text(PROBE.format(width=width, page=html.escape(page)), encoding='utf-8')
    flags = ['headless', 'no-sandbox', 'disable-gpu', 'no-first-run', 'disable-background-networking',
             'disable-component-update', 'disable-sync', f'user-data-dir={tmp_path}/profile',
             f'blink-settings=preferredColorScheme={0 if dark else 1}',
             f'window-size={max(width, 500)},900', 'enable-logging=stderr', 'v=0', 'dump-dom']
    cmd = [BROWSER, *('--' + o for o in flags), probe.as_uri()]
    res = subprocess.run(cmd, capture_output=True, text=True, timeout=120)
    seen = re.search('<pre id="seen">(.+?)</pre>', res.stdout)
    assert seen, res.stderr
    return {**json.loads(html.unescape(seen[1])), 'console': re.findall(':CONSOLE.*', res.stderr)}

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The folder of a run with two seeds and an exhibit of every kind"
    path = tmp_path_factory.mktemp('report')/'run'
    run = Run(path, 'vbgs-kd', data(), 'digits <b>&', seeds=2, show=False, lam=.9)
    for _ in run.each_seed():
        dense = run.fit('student', run.learner(run.network('lenet300', hidden=(20,10))), 2, 1e-3)
        run.enter('small', run.network('lenet300', hidden=(5,4)), of=dense, agreement=.9+run.seed/10)
    for o in exhibits(np.random.default_rng(0)).values(): run.exhibit(o.name, o.kind, o.data, o.title, o.text, **o.labels)
    run.finish(run.models['small'], of=run.models['student']).report()
    return path

@pytest.fixture(scope='module')
def page(folder): return (folder/'report.html').read_text(encoding='utf-8')

@pytest.mark.long
@in_browser
@pytest.mark.parametrize('width,dark', [(390,False), (390,True), (1280,False)])
def test_in_a_browser(page, width, dark, tmp_path):
    seen = look(page, width, tmp_path, dark)
    assert not seen['console']
    assert len(seen['pictures'])>=8+12 and all(seen['pictures'])
    assert seen['excess']<=0 and seen['mobile'] and seen['smallest']>=9
    assert seen['paper']==('rgb(20, 23, 27)' if dark else 'rgb(255, 255, 255)') and seen['letters']==seen['ink']!=seen['paper']

@in_browser
def test_look_sees_faults(tmp_path):
    seen = look('<img src="none.png"><p style="width:900px">wide</p><script>fails()</script>', 390, tmp_path)
    assert 'fails is not defined' in seen['console'][0]
    assert seen['pictures']==[0] and seen['excess']>0 and not seen['mobile']

def named(bad):
    "A record in which every text is `bad`"
    r = fake_record(data=bad, settings={bad: bad}, versions={bad: bad}, verdict=bad)
    for o in r.stages: o['name'] += bad
    for o in r.exhibits.values(): o.title = o.text = bad; o.labels = {k: bad for k in o.labels}
    for k in ('weights','curve','lines','maps'): r.exhibits[k].data = {n+bad: v for n,v in r.exhibits[k].data.items()}
    for k in ('scatter','embedding'): r.exhibits[k].data = r.exhibits[k].data.assign(label=bad)
    r.exhibits['table'].data = r.exhibits['table'].data.rename(columns=lambda c: bad, index=lambda c: bad)
    r.layers['before'][0]['path'] = bad
    return r

@pytest.mark.filterwarnings('ignore:constrained_layout not applied')
def test_text_is_escaped():
    r,bad = named('<b>"5 %" & \'x\'</b>'),re.compile('<b>"5|&amp;(lt|gt|amp|#34|quot);')
    for o in (report(r), compare(r, fake_record('runs/x<b>"5'))): assert not bad.search(str(o)) and '&lt;b&gt;&#34;5\u00a0%&#34; &amp;' in str(o)
    assert report(r)._repr_html_().count('&lt;b&gt;')>20

@in_browser
@pytest.mark.filterwarnings('ignore:constrained_layout not applied')
def test_names_are_no_code(tmp_path):
    r = named('<script>fails()</script><img src=none.png>')
    for o in (report(r), compare(r, fake_record('runs/x<script>fails()</script>'))):
        seen = look(str(o), 390, tmp_path)
        assert not seen['console'] and all(seen['pictures'])

def test_all_is_in_the_page(page, folder):
    r = Record(folder)
    for o in r.exhibits.values(): assert o.title in page and o.text in page
    assert 'student' in page and '±' in page and 'digits &lt;b&gt;&amp;' in page and '<td>0.9' in page
    assert f"load_model('{folder/'model.safetensors'}')" in html.unescape(page) and '# x: images (N, 1, 8, 8)' in page
    assert '10×64 →' not in page and '20×64 → 5×64' in page                              # the layers
    assert 'http' not in page.replace('http://www.w3.org', '')

def test_the_folder_is_enough(page, folder):
    assert str(report(folder))==page                                     # and it comes out the same each time
    body = page[page.index('<h1>'):page.rindex('</div>')].strip()
    assert body in Record(folder)._repr_html_() and '<html' not in Record(folder)._repr_html_()

def test_what_was_exported_is_in_the_page(folder):
    row = dict(form='ONNX, int8', file='small<1>.onnx', bytes=30_000, accuracy=.9812, ms={'1': [.25,2.], '64': [4.,60.]})
    (folder/'exported.json').write_text(json.dumps([row]))
    try:
        text = str(report(folder))
        assert 'Without torch' in text and 'small&lt;1&gt;.onnx' in text and '98.12' in text and '0.25 ms, 8.0 ×' in text and '4 ms, 15.0 ×' in text
        (folder/'exported.json').write_text('{')
        with pytest.raises(ValueError, match='exported.json is damaged'): report(folder)
    finally: (folder/'exported.json').unlink()
    assert 'Without torch' not in str(report(folder))

def test_size_and_time():
    r = fake_record(big=8, n_seeds=5, n_more=20)
    start = time.process_time()
    assert len(str(report(r)))<5_000_000
    assert time.process_time()-start<5

def test_rows_are_means_and_spreads():
    r = fake_record(n_seeds=4)
    acc = [100*o['test_accuracy'] for o in r.stages if o['name']=='student']
    row = next(o for o in stage_rows(r.stages) if o['stage']=='student')
    assert row['test accuracy, %']==f'{np.mean(acc):.2f} ± {np.std(acc, ddof=1):.2f}'
    assert row['weights']=='266 k' and row['weights kept']=='100.0 %' and row['agreement'].startswith('0.965 ± 0.013')
    assert 'seeds' not in row and '±' not in str(stage_rows(fake_record(n_seeds=1).stages))
    assert stage_rows(r.stages[:-1])[-1]['seeds']=='3'               # a seed is still to come

def stage(name, acc, weights, macs=100, n_bytes=100, ms=1.): return dict(name=name, seed=0, test_accuracy=acc, weights=weights, macs=macs, bytes=n_bytes, latency_ms=ms)

@pytest.mark.parametrize('after,says', [
    (stage('b', .95, 10, 10, 50, .1), ['10.0 % of the weights', 'gains 5.00 points', '10 times fewer mult', '2.0 times less memory', '10 times less time']),
    (stage('b', .85, 50), ['50.0 %', 'loses 5.00 points', 'as many multiplications, as much memory and as much time']),
    (stage('b', .9, 50, 200, 100, None), ['keeps the test accuracy', '2.0 times more multiplications and as much memory.'])])
def test_verdict(after, says):
    text = verdict([stage('a', .9, 100), after])
    assert all(o in text for o in says), text

def test_no_latency_is_called_less_within_its_spread():
    a,b = (stage(k, .9, 100, ms=ms) | dict(latency_spread_ms=s) for k,ms,s in (('a',1.,.2), ('b',.75,.1)))
    assert verdict([a, b | dict(weights=50)]).endswith('and as much time within the spread.')
    assert '1.3 times less time' in verdict([a | dict(latency_spread_ms=.1), b | dict(weights=50)])
    row = stage_rows([a])[0]
    assert row['latency']=='1.00 ± 0.20 ms' and 'latency spread ms' not in row and stage_rows([stage('a', .9, 100)])[0]['latency']=='1.00 ms'
    r = fake_record(stages=[a, b | dict(weights=50)], n_seeds=1)
    assert 'as fast within the spread' in str(report(r)) and '1.3 times' not in str(report(r))

def test_latencies_are_kept_with_their_spread(tmp_path):
    run = Run(tmp_path/'run', 'own', data(), show=False)
    run.finish(run.enter('student', run.network('lenet300')))
    s, = Record(tmp_path/'run').stages
    assert s['latency_ms']>0 and 0<=s['latency_spread_ms']<s['latency_ms'] and f"± {s['latency_spread_ms']:.2f} ms" in str(report(run))

def test_names_beside_points_do_not_cover_each_other():
    from kdnb.drawing import _common,label_points
    rng = np.random.default_rng(0)
    for n,spread in ((12,.02), (20,1.)):
        ax = plt.subplots(figsize=(4.7,2.8), layout='constrained')[1]
        x,y = 1+spread*rng.random(n),90+spread*rng.random(n)
        ax.plot(x, y, 'o', ms=5)
        label_points(ax, zip(x, y), [f'stage 0.{i}' for i in range(n)])
        ax.figure.draw_without_rendering()
        boxes = [t.get_window_extent() for t in ax.texts if t.get_text()]
        covered = sum(_common(a, b)>0 for i,a in enumerate(boxes) for b in boxes[:i])
        assert len(boxes)==n and covered<=n//10 and all(ax.figure.bbox.x0-1<=b.x0 and b.x1<=ax.figure.bbox.x1+1 for b in boxes)
        plt.close('all')

SHOWN = '''<!doctype html><iframe style="width:{width}px;height:844px;border:0" srcdoc="{page}"></iframe><pre id="seen"></pre><script>onload = () => {{
  const win = frames[0], doc = win.document, facts = [...doc.querySelectorAll('.facts tr>td:first-child')], wide = doc.querySelector('.wide')
  document.querySelector('#seen').textContent = JSON.stringify({{
    lines: facts.map(o => o.getBoundingClientRect().height/parseFloat(win.getComputedStyle(o).lineHeight)),
    lefts: facts.map(o => [o.textContent, Math.round((() => {{ const r = doc.createRange(); r.selectNodeContents(o); return r.getClientRects().length }})())]),
    hint: win.getComputedStyle(wide).backgroundImage.includes('gradient'), scrolls: wide.scrollWidth > wide.clientWidth}}) }}</script>'''

@pytest.mark.long
@in_browser
@pytest.mark.parametrize('width', [390,1280])
def test_settings_keep_their_names_whole_and_tables_show_that_they_scroll(width, tmp_path, monkeypatch):
    r = fake_record(settings=dict(transfer_methods=['fine-tuning','LwF','FitNet','AT','NST','VID-LP','VID-I'], weights=dict(KD=[1,10], FitNet=[10,100]), same_updates=True))
    monkeypatch.setattr('test_report.PROBE' if 'test_report' in sys.modules else f'{__name__}.PROBE', SHOWN)
    seen = look(str(report(r)), width, tmp_path)
    assert {k: n for k,n in seen['lefts']}=={k: 1 for k,_ in seen['lefts']} and len(seen['lefts'])>8
    assert seen['hint'] and (seen['scrolls'] or width==1280) and 'KD: (1, 10), FitNet: (10, 100)' in str(report(r))

def test_what_is_missing_is_left_out():
    assert 'No stage is done yet' in str(report(fake_record(stages=[], exhibits={}, layers={})))
    bare = [dict(name='teacher', seed=0, test_accuracy=.5, weights=10)]
    text = str(report(fake_record(stages=bare, exhibits={}, layers=dict(before=[], after=[]), n_seeds=1, has_test=False)))
    assert 'VALIDATION images' in text and 'Learning' not in text and 'Layer by layer' not in text and 'MACs</th>' not in text
    lost = fake_record()
    lost.stages[0] |= dict(test_accuracy=math.nan, latency_ms=None, curves=[dict(train_loss=math.nan, valid_loss=None, accuracy=.5)])
    assert 'teacher' in str(report(lost))
    assert 'what the recipe says' in str(report(fake_record(verdict='what the recipe says')))

def test_layers_that_became_two():
    layer = lambda path, n, kind='Linear': dict(path=path, kind=kind, shape=f'{n}', weights=n, params=n+1, macs=n, bytes=4*n)
    rows = layer_rows(dict(before=[layer('fc1', 100), layer('fc2', 50), layer('total', 150)],
                           after=[layer('fc1.0', 0, 'KeepInputs'), layer('fc1.1', 10), layer('fc2', 5), layer('new', 3), layer('total', 18)]))
    assert [o['layer'] for o in rows]==['fc1','fc2','new','total']
    assert rows[0]['weights']=='100 → 10' and rows[0]['kept']=='10.0 %' and rows[0]['shape']=='100 → 10' and rows[2]['weights']=='– → 3'
    assert 'kept' not in layer_rows(dict(before=[], after=[layer('fc1', 10)]))[0]

def test_weights_that_are_gone_are_transparent():
    w = np.random.default_rng(0).normal(size=(20,30)); w[:5] = 0; w[:,10:20] = 0
    img = weight_image(w)
    assert ((img[...,3]==0)==(w==0)).all()
    assert (img[w>0][:,0]>img[w>0][:,2]).all() and (img[w<0][:,0]<img[w<0][:,2]).all()      # red, blue
    assert weight_image(np.zeros((2,2))).max(where=[[[0,0,0,1]]*2]*2, initial=0)==0
    big = np.random.default_rng(0).normal(size=(500,700))
    assert weight_image(big).shape==(160,160,4)
    assert np.isclose(_pooled(big[:480,:640]), big[:480,:640].reshape(160,3,160,4).mean((1,3))).all()

def test_log_alpha_of_many_layers_and_thresholds():
    la = {f'l{i}': np.random.default_rng(i).normal(size=(5,10)) for i in range(20)}
    show = lambda n, T: exhibit_html(Exhibit('a', 'log_alpha', 'A', '', dict(groups=dict(list(la.items())[:n]), threshold=T)))
    assert show(3, 0.).count('<svg')==3 and show(20, {k: 0. for k in la}).count('<svg')==1
    assert f'l1: {(la["l1"][-1]<-1).sum()} of 10 kept' in show(3, dict(l0=0., l1=-1., l2=1.))

def test_pictures_leave_nothing_behind():
    before,n = dict(plt.rcParams),plt.get_fignums()
    report(fake_record())
    broken = fake_record()
    broken.exhibits['curve'].data = {'x': pd.DataFrame(dict(a=[1]))}
    with pytest.raises(ValueError, match='It needs sparsity'): report(broken)
    assert dict(plt.rcParams)==before and plt.get_fignums()==n

def test_a_notebook_s_first_picture_may_be_that_of_a_report():
    "The backend becomes interactive while it draws, and stays so"
    was = plt.isinteractive()
    try:
        plt.ioff()
        with _in_style(): plt.ion()
        assert plt.isinteractive()
        plt.ioff()
        with _in_style(): pass
        assert not plt.isinteractive()
    finally: (plt.ion if was else plt.ioff)()

def test_compare(folder, tmp_path):
    a,b = fake_record('runs/a'),fake_record('runs/b', settings=dict(lam=.5, T=4.), seeds=(0,1))
    text = str(compare(a, b))
    assert re.search(r'lam</td>\s*<td>0.9</td>\s*<td>0.5', text) and 'T</td>' not in text and 'seeds</td>' in text
    assert 'Nothing: settings' in str(compare(a, fake_record('runs/b')))
    assert 'one/run' in str(compare(fake_record('one/run'), fake_record('two/run')))
    svg = str(compare(fake_record('runs/_old'), fake_record('runs/c$o_{t$'))).split('<svg')[1]      # names are no formulas, and none is hidden
    assert '>_old<' in svg and '>c$o_{t$<' in svg
    with pytest.raises(ValueError, match='more than once'): compare(folder, folder)
    with pytest.raises(ValueError, match='no stage yet'): compare(a, fake_record('runs/c', stages=[]))
    with pytest.raises(FileNotFoundError, match='is not the folder of a run'): compare(folder, tmp_path)

def test_of_a_run_that_begins_anew_only_what_is_known_is_shown(tmp_path):
    def run(name, finish):
        r = Run(tmp_path/'run', 'own', data(), show=False, force=True)
        model = r.enter('student', r.network(name))
        return r.finish(model).report() if finish else r.report()
    def shown(page): return [o in page.read_text() for o in ('Use it','latency')]
    assert shown(run('lenet300', True))==[True,True] and shown(run('mlp1024', False))==[False,False]
    assert 'latency_ms' not in Record(tmp_path/'run').stages[0]
    assert shown(run('mlp1024', True))==[True,True]

def test_the_lines_that_load_a_network_are_python():
    import ast
    from kdnb.report.page import how_to_load
    for path in ("runs/it's", 'runs/a"b'):
        line = how_to_load(fake_record(path)).splitlines()[1]
        assert ast.parse(line).body[0].value.args[0].value==f'{path}/model.safetensors'
