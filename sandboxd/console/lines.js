// A list of many lines of which only those around the visible part are elements of the page.

// Lines of a block; blocks are added to the page and taken from it as a whole.
const SIZE = 100;

// Pixels above and below the visible part for which there are elements.
const MARGIN = 600;

/** The scrolled element's class is "lines". Lines that are long are wrapped if it has the class "wrap" too. */
export class LineList {
  /** @param draw makes the element of a line. */
  constructor(scroller, draw) {
    this.scroller = scroller;
    this.draw = draw;
    this.blocks = [];
    this.count = 0;
    this.height = 20; // of a line that is not wrapped, in pixels
    this.columns = 80; // that fit beside the gutter
    this.above = document.createElement("div");
    this.below = document.createElement("div");
    scroller.append(this.above, this.below);
  }

  clear() {
    for (const block of this.blocks) block.element?.remove();
    this.blocks = [];
    this.count = 0;
  }

  push(line) {
    let block = this.blocks.at(-1);
    if (!block || block.lines.length === SIZE) {
      block = { lines: [], height: 0, element: null, stale: false };
      this.blocks.push(block);
    }
    block.lines.push(line);
    block.height += this.estimate(line);
    this.count += 1;
  }

  /** The last lines, one of which has changed. */
  touch() {
    for (const block of this.blocks.slice(-2)) block.stale = true;
  }

  /** Take out the blocks of which all lines are before the number `first`. */
  dropBefore(first) {
    let height = 0;
    while (this.blocks.length && this.blocks[0].lines.at(-1).number < first) {
      const block = this.blocks.shift();
      height += block.height;
      this.count -= block.lines.length;
      block.element?.remove();
    }
    if (height) this.scroller.scrollTop -= height;
  }

  /** Draw all anew: the width, the size of letters or what is shown of a line has changed. */
  reset() {
    const sample = this.draw({ number: 1, stream: "stdout", time: "", text: "0".repeat(100), style: null });
    const list = document.createElement("div");
    list.className = "block measure";
    list.append(sample);
    this.scroller.append(list);
    const text = sample.querySelector(".text");
    this.height = Math.max(8, sample.getBoundingClientRect().height);
    const range = document.createRange();
    range.selectNodeContents(text);
    const width = range.getBoundingClientRect().width / 100 || 8;
    this.columns = Math.max(8, Math.floor((this.scroller.clientWidth - text.offsetLeft - 8) / width));
    list.remove();
    for (const block of this.blocks) {
      block.element?.remove();
      block.element = null;
      block.height = block.lines.reduce((sum, line) => sum + this.estimate(line), 0);
    }
  }

  estimate(line) {
    return this.wrap ? this.height * Math.max(1, Math.ceil((line.text ?? "").length / this.columns)) : this.height;
  }

  get wrap() { return this.scroller.classList.contains("wrap"); }

  get atEnd() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    return scrollTop + clientHeight >= scrollHeight - this.height;
  }

  /** Scroll to the end. */
  end() {
    this.update();
    for (let turn = 0; turn < 3; turn += 1) { // the heights of what becomes visible may differ from their estimates
      this.scroller.scrollTop = this.scroller.scrollHeight;
      this.update();
    }
  }

  /** Bring the elements in line with the lines and with what is visible. */
  update() {
    const scroller = this.scroller;
    const from = scroller.scrollTop - MARGIN, to = scroller.scrollTop + scroller.clientHeight + MARGIN;
    let position = 0, above = 0, below = 0, moved = 0;
    let place = this.above;
    const drawn = [];
    for (const block of this.blocks) {
      const end = position + block.height;
      if (end < from || position > to) {
        block.element?.remove();
        block.element = null;
        if (end < from) above += block.height;
        else below += block.height;
      } else {
        this.render(block);
        if (place.nextSibling !== block.element) place.after(block.element);
        place = block.element;
        drawn.push([block, position]);
      }
      position = end;
    }
    this.above.style.height = `${above}px`;
    this.below.style.height = `${below}px`;
    for (const [block, start] of drawn) {
      const height = block.element.getBoundingClientRect().height;
      if (start + block.height <= scroller.scrollTop) moved += height - block.height;
      block.height = height;
    }
    if (Math.abs(moved) >= 1) scroller.scrollTop += moved; // what is read stays where it is
  }

  render(block) {
    if (!block.element) {
      block.element = document.createElement("div");
      block.element.className = "block";
    }
    if (block.stale) block.element.replaceChildren();
    block.stale = false;
    const missing = block.lines.slice(block.element.childElementCount);
    block.element.append(...missing.map(this.draw));
  }
}
