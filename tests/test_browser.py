"The report in a real browser: nothing on its console, every picture drawn, no sideways scrolling on a phone."
import html, json, re, subprocess
from shutil import which

import pytest

from kdnb.cli import main

BROWSER = which('chromium') or which('chromium-browser') or which('google-chrome')
pytestmark = pytest.mark.skipif(not BROWSER, reason='no chromium, chromium-browser or google-chrome on the PATH')
PROBE = '''<!doctype html>
<iframe style="width:{width}px;height:844px;border:0" srcdoc="{page}"></iframe><pre id="seen"></pre>
<script>onload = () => {{
  const win = frames[0], doc = win.document
  document.querySelector('#seen').textContent = JSON.stringify({{
    pictures: [...doc.querySelectorAll('img, svg')].map(o => o.naturalWidth ?? o.getBoundingClientRect().width),
    excess: doc.documentElement.scrollWidth - win.innerWidth, mobile: !!doc.querySelector('meta[name=viewport]') }})
}}</script>'''

def look(page, width, tmp_path):
    "Show `page` in a frame of `width` pixels (no headless window is narrower than 500) and say what is seen"
    probe = tmp_path/'probe.html'
    probe.write_text(PROBE.format(width=width, page=html.escape(page)), encoding='utf-8')
    flags = ['headless', 'no-sandbox', 'disable-gpu', 'no-first-run', 'disable-background-networking',
             'disable-component-update', 'disable-sync', f'user-data-dir={tmp_path}/profile',
             f'window-size={max(width, 500)},900', 'enable-logging=stderr', 'v=0', 'dump-dom']
    cmd = [BROWSER, *('--' + o for o in flags), probe.as_uri()]
    res = subprocess.run(cmd, capture_output=True, text=True, timeout=120)
    seen = re.search('<pre id="seen">(.+?)</pre>', res.stdout)
    assert seen, res.stderr
    return {**json.loads(html.unescape(seen[1])), 'console': re.findall(':CONSOLE.*', res.stderr)}

@pytest.fixture(scope='module')
def report_html(tmp_path_factory):
    out = tmp_path_factory.mktemp('report')/'run'
    assert main(['compress', '--epochs', '2,2,4', '--out', str(out), '--quiet']) == 0
    return (out/'report.html').read_text(encoding='utf-8')

@pytest.mark.parametrize('width', [390, 1280])
def test_report(report_html, width, tmp_path):
    seen = look(report_html, width, tmp_path)
    assert not seen['console']
    assert seen['pictures'] and all(seen['pictures'])
    assert seen['excess'] <= 0 and seen['mobile']

def test_look_sees_faults(tmp_path):
    seen = look('<img src="none.png"><p style="width:900px">wide</p><script>fails()</script>', 390, tmp_path)
    assert 'fails is not defined' in seen['console'][0]
    assert seen['pictures'] == [0] and seen['excess'] > 0 and not seen['mobile']
