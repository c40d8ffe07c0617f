// The script of the server's page, run by node without a browser: a page of plain objects stands in for the document.
//   node page_check.js http://127.0.0.1:PORT/
// Talks with the server as a user would, and ends with status 1 and a sentence where something is not as it should be.
'use strict';
const base = process.argv[2];

class Element {
  constructor(id = '') {
    Object.assign(this, {id, value: '', textContent: '', hidden: false, disabled: false, className: '', children: [],
                         style: {}, attributes: {}, listeners: {}, fills: [], scrollTop: 0, scrollHeight: 0, clientHeight: 0});
  }
  get firstElementChild() { return this.children[0] ??= new Element(); }
  append(...all) { this.children.push(...all); }
  replaceChildren(...all) { this.children = all; if (all[0] && this.id === 'policy') this.value = all[0].value; }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  addEventListener(type, listener) { this.listeners[type] = listener; }
  fire(type, event = {}) { return this.listeners[type]({preventDefault() {}, ...event}); }
  focus() {}
  getContext() {
    const element = this;
    return {clearRect() { element.fills = []; }, fillRect(x, y, w, h) { element.fills.push([this.fillStyle, x, y, w, h]); }};
  }
}

const elements = {};
const $ = id => elements[id] ??= new Element(id);
const everywhere = new Element();
globalThis.document = {getElementById: $, createElement: () => new Element(), documentElement: new Element(),
                       addEventListener: (...all) => everywhere.addEventListener(...all)};
globalThis.Option = function (text, value) { this.text = text; this.value = value; };
globalThis.getComputedStyle = () => ({getPropertyValue: name => name});
globalThis.sessionStorage = {getItem: () => null, setItem() {}};
globalThis.addEventListener = () => {};
globalThis.matchMedia = () => ({addEventListener() {}});
const realFetch = fetch;
globalThis.fetch = (path, options) => realFetch(new URL(path, base), options);

function require_(condition, sentence) {
  if (condition) return;
  console.error(sentence);
  process.exit(1);
}
async function until(condition, sentence) {
  for (let i = 0; i < 3600 && !condition(); ++i) await new Promise(resolve => setTimeout(resolve, 50));
  require_(condition(), sentence);
}
const whole = () => $('status').textContent.includes('generated') && !$('send').disabled;
const answers = () => $('log').children.map(turn => turn.children[1] && turn.children[1].textContent);

async function main() {
  const page = await (await realFetch(base)).text();
  (0, eval)(page.match(/<script>([^]*)<\/script>/)[1]);
  await until(() => $('policy').children.length > 0, 'the policies are not shown');
  require_($('policy').children.map(option => option.value).join() === 'full,h2o(64),window(16)', 'other policies are shown');

  $('temperature').value = '0';
  $('most').value = '24';
  $('policy').value = 'window(16)';
  $('question').value = 'The sea was';
  $('form').fire('submit');
  await until(whole, 'no answer has come: ' + $('status').textContent);
  require_(answers().length === 2 && answers()[1].length > 10, 'the answer is not shown: ' + answers());
  const resident = $('canvas').fills.filter(([colour]) => colour === '--resident');
  const left = $('canvas').fills.filter(([colour]) => colour === '--dropped');
  require_(left.length > 0 && resident.length >= left.length, 'the cache is not drawn');
  const seen = left[0][3];
  require_(resident.some(([, x, , width]) => x + width === seen && width < 17), 'the last positions are not shown as resident');
  require_(/^window\(16\): 16 of \d+ tokens resident/.test($('numbers').textContent), 'the counts are not shown: ' + $('numbers').textContent);
  require_($('canvas').attributes['aria-label'].includes($('numbers').textContent), 'the picture has no words');
  require_(Number($('meter').attributes['aria-valuenow']) > 0, 'the meter stands still');

  $('question').value = ' And then';
  $('question').fire('keydown', {key: 'Enter', shiftKey: false});
  await until(() => answers().length === 4 && whole(), 'no second answer has come');

  $('most').value = '50000';
  $('question').value = ' Once more';
  $('form').fire('submit');
  await until(() => answers().length === 6 && answers()[5].length > 0, 'no third answer has begun');
  everywhere.fire('keydown', {key: 'Escape'});
  await until(() => $('status').textContent === 'Stopped.', 'Escape does not stop');
  require_(!$('send').disabled && $('stop').disabled, 'the buttons do not come back');
  $('clear').fire('click');
  require_(answers().length === 0, 'a new conversation is not empty');
}

main().then(() => process.exit(0), error => { console.error(error); process.exit(1); });
