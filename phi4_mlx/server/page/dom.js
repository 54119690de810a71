/** Elements: finding, making and copying from them. Text stays text; nothing here parses HTML. */

/**
 * The element with an id.
 * @param {string} id
 * @returns {any}
 */
export const $ = (id) => document.getElementById(id);

/**
 * Makes an element.
 * @param {string} spec "tag.class.class"
 * @param {object} [properties] of the element
 * @param {...(Node | string)} children strings become text nodes
 * @returns {any}
 */
export function make(spec, properties = {}, ...children) {
  const [tag, ...classes] = spec.split(".");
  const element = Object.assign(document.createElement(tag), properties);
  element.classList.add(...classes);
  element.append(...children);
  return element;
}

/**
 * An icon of the sprite in index.html.
 * @param {string} name without "i-"
 * @returns {SVGElement}
 */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/**
 * A button that shows an icon and is named by a label.
 * @param {string} name of the icon
 * @param {string} label
 * @param {(event: MouseEvent) => void} onclick
 * @param {string} [classes] ".more.classes"
 * @returns {HTMLButtonElement}
 */
export function iconButton(name, label, onclick, classes = "") {
  return make(`button.icon${classes}`, { type: "button", title: label, ariaLabel: label, onclick }, icon(name));
}

/**
 * Copies text to the clipboard and shows on the button that it has.
 * @param {string} text
 * @param {HTMLButtonElement} button
 */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // missing over plain http from another machine; the old way still works
    const area = make("textarea.unseen", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.replaceChildren(icon("done"));
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}

/**
 * A function that runs `draw` before the next frame, once for any number of calls until then.
 * @param {() => void} draw
 * @returns {() => void}
 */
export function beforeNextFrame(draw) {
  let frame = 0;
  return () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      draw();
    });
  };
}
