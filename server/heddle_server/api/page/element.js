// Elements made of text alone: nothing that a server or an adapter says ever becomes markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children, which are elements or text. An attribute of null or false is left out. */
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for drawings. */
export function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** Sets attributes of an element that is there, as `element` does. */
export function setAttributes(target, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) target.removeAttribute(name);
    else target.setAttribute(name, value === true ? "" : value);
  }
}

function filled(made, attributes, children) {
  setAttributes(made, attributes);
  made.append(...children);
  return made;
}
