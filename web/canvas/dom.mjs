// Making elements.

/** An element with properties (`style`, `dataset` and `aria` as objects, `on` as listeners) and children. */
export function make(tag, { style, dataset, aria, on, ...properties } = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, properties);
  Object.assign(element.style, style);
  Object.assign(element.dataset, dataset);
  for (const [name, value] of Object.entries(aria ?? {})) element.setAttribute(name === "role" ? "role" : `aria-${name}`, value);
  for (const [name, listener] of Object.entries(on ?? {})) element.addEventListener(name, listener);
  element.append(...children);
  return element;
}

/** Set a field's value where it differs: setting it anyway would move the caret and forget what the field itself can undo. */
export function fill(field, value) {
  if (field.value !== String(value)) field.value = value;
}
