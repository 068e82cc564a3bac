// The panel's looks, in the frontend's own colours. The sheet lies inside the panel and names its classes only.

export const STYLE = `
.concept-canvas { display: flex; gap: 6px; width: 100%; height: 100%; box-sizing: border-box; padding: 2px; position: relative; min-height: 320px;
  font: 12px/1.35 sans-serif; color: var(--input-text, #ddd); contain: size; }
.concept-canvas * { box-sizing: border-box; }
.concept-canvas-left { flex: 1 1 0; min-width: 0; display: flex; flex-direction: column; gap: 4px; }
.concept-canvas-bar { display: flex; flex-wrap: wrap; gap: 2px; align-items: center; }
.concept-canvas button { min-width: 26px; height: 26px; padding: 0 5px; border: 1px solid transparent; border-radius: 5px; cursor: pointer;
  background: transparent; color: inherit; font: inherit; display: inline-flex; align-items: center; justify-content: center; }
.concept-canvas button:hover { background: var(--comfy-input-bg, #333); border-color: var(--border-color, #555); }
.concept-canvas button[aria-pressed="true"] { background: var(--comfy-input-bg, #333); border-color: var(--input-text, #ddd); }
.concept-canvas button:disabled { opacity: 0.35; cursor: default; }
.concept-canvas svg { width: 16px; height: 16px; fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.concept-canvas-gap { flex: 0 0 6px; }
.concept-canvas-stage { flex: 1 1 0; min-height: 0; position: relative; border-radius: 6px; overflow: hidden; background: var(--comfy-input-bg, #222); }
.concept-canvas-stage canvas { position: absolute; inset: 0; width: 100%; height: 100%; touch-action: none; display: block; }
.concept-canvas-keys { position: absolute; left: 0; top: 0; width: 1px; height: 1px; opacity: 0; padding: 0; border: 0; resize: none; pointer-events: none; }
.concept-canvas-stage:has(:focus) { outline: 1.5px solid var(--p-primary-color, #6aa3ff); outline-offset: -1.5px; }
.concept-canvas-foot { display: flex; gap: 8px; }
.concept-canvas-size { flex: 0 0 auto; opacity: 0.6; font-variant-numeric: tabular-nums; }
.concept-canvas-hint { flex: 1 1 0; min-width: 0; min-height: 16px; opacity: 0.75; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.concept-canvas-hint[data-loud] { opacity: 1; color: var(--error-text, #ff8a80); }
.concept-canvas .concept-canvas-common { flex: 1 0 auto; padding-top: 5px; border-top: 1px solid var(--border-color, #444); }
.concept-canvas-report { flex: 1 1 90px; min-height: 90px; height: 0; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; user-select: text;
  padding: 4px 6px; border-radius: 5px; background: var(--comfy-input-bg, #222); opacity: 0.85; }
.concept-canvas-side { flex: 0 0 42%; max-width: 260px; min-width: 150px; display: flex; flex-direction: column; gap: 4px; overflow-y: auto; overflow-x: hidden; }
.concept-canvas-list { display: flex; flex-direction: column; gap: 2px; flex: 0 0 auto; max-height: 40%; overflow-y: auto; }
.concept-canvas-row { display: flex; gap: 3px; align-items: center; padding: 2px 3px; border-radius: 5px; border: 1px solid transparent; cursor: pointer; }
.concept-canvas-row[aria-selected="true"] { background: var(--comfy-input-bg, #333); border-color: var(--p-primary-color, #6aa3ff); }
.concept-canvas-row[data-hidden] { opacity: 0.5; }
.concept-canvas-number { flex: 0 0 14px; text-align: right; opacity: 0.7; cursor: grab; touch-action: none; }
.concept-canvas-row input[type="color"] { flex: 0 0 18px; height: 18px; padding: 0; border: 0; background: none; cursor: pointer; }
.concept-canvas-row input[type="text"] { flex: 1 1 0; min-width: 0; }
.concept-canvas-row button { min-width: 22px; height: 22px; padding: 0; }
.concept-canvas input[type="text"], .concept-canvas input[type="number"], .concept-canvas textarea, .concept-canvas select { width: 100%;
  background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); border: 1px solid var(--border-color, #444); border-radius: 5px; padding: 3px 5px; font: inherit; }
.concept-canvas-row input[type="text"] { background: transparent; border-color: transparent; }
.concept-canvas-row input[type="text"]:focus { background: var(--comfy-input-bg, #222); border-color: var(--border-color, #666); }
.concept-canvas :is(input, textarea)[data-wrong] { border-color: var(--error-text, #ff6b6b) !important; }
.concept-canvas ::placeholder { color: inherit; opacity: 0.45; }
.concept-canvas input:disabled { opacity: 0.45; }
.concept-canvas textarea { resize: vertical; min-height: 44px; }
.concept-canvas-bar select { width: auto; max-width: 220px; height: 26px; }
.concept-canvas-fields { display: flex; flex-direction: column; gap: 4px; flex: 0 0 auto; }
.concept-canvas-fields label { display: flex; flex-direction: column; gap: 1px; }
.concept-canvas-fields label > span, .concept-canvas-title { opacity: 0.75; font-size: 11px; }
.concept-canvas-pair { display: flex; gap: 4px; }
.concept-canvas-pair > * { flex: 1 1 0; min-width: 0; }
.concept-canvas-lora { display: flex; gap: 3px; align-items: center; }
.concept-canvas-lora > span { flex: 1 1 0; min-width: 0; }
.concept-canvas-lora > span, .concept-canvas-matches > div { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; direction: rtl; text-align: left; }
.concept-canvas-heads { display: flex; justify-content: space-between; padding-right: 32px; }
.concept-canvas-lora[data-missing] > span { color: var(--error-text, #ff8a80); text-decoration: underline wavy; }
.concept-canvas-lora input[type="number"] { flex: 0 0 52px; width: 52px; }
.concept-canvas-matches { max-height: 110px; overflow-y: auto; border: 1px solid var(--border-color, #444); border-radius: 5px; }
.concept-canvas-matches > div { padding: 2px 5px; cursor: pointer; }
.concept-canvas-matches > div[aria-selected="true"], .concept-canvas-matches > div:hover { background: var(--border-color, #555); }
.concept-canvas-sheet { position: absolute; inset: 0; z-index: 2; display: flex; flex-direction: column; gap: 6px; padding: 10px; overflow: auto;
  background: var(--comfy-menu-bg, #353535); border-radius: 6px; border: 1px solid var(--border-color, #555); }
.concept-canvas-sheet textarea { flex: 1 1 0; font: 11px/1.4 monospace; resize: none; }
.concept-canvas-sheet table { border-spacing: 8px 2px; text-align: left; }
.concept-canvas-sheet kbd { font: 11px monospace; white-space: nowrap; }
.concept-canvas-sheet strong { color: var(--error-text, #ff8a80); overflow-wrap: anywhere; }
.concept-canvas [hidden] { display: none !important; }
`;

const ICONS = {
  select: "M4 2l9 6.2-4 .9 2.3 4.3-1.9 1-2.3-4.4L4 13z",
  box: "M2.5 3.5h11v9h-11z",
  ellipse: "M8 3.2c3.3 0 6 2.1 6 4.8s-2.7 4.8-6 4.8-6-2.1-6-4.8 2.7-4.8 6-4.8z",
  polygon: "M8 2l6 4.6-2.3 7H4.3L2 6.6z",
  brush: "M13.5 2.5L7 9M7.6 8.4c1.6.3 2 2 .9 3.3-1.2 1.5-3.6 2-6 1.6 1.3-.7 1.4-1.7 1.900-3 .5-1.4 1.900-2.2 3.2-1.900z",
  eraser: "M6 13h8M3 9.5l6-6.3 4 4L7.5 13h-2z M6.2 6.2l4 4",
  undo: "M6 3L2.5 6.5 6 10M3 6.5h6.5a3.5 3.5 0 010 7H6",
  redo: "M10 3l3.5 3.5L10 10M13 6.5H6.5a3.5 3.5 0 000 7H10",
  fit: "M2.5 6V2.5H6M10 2.5h3.5V6M13.5 10v3.5H10M6 13.5H2.5V10",
  adding: "M2.5 2.5h7v7h-7zM11 7.5h2.5v6h-6V11M6 4.5v3M4.5 6h3",
  new: "M8 3v10M3 8h10",
  rest: "M2.5 2.5h11v11h-11zM6 6h4v4H6zM3 3l3 3M13 3l-3 3M3 13l3-3M13 13l-3-3",
  duplicate: "M5.5 5.5h8v8h-8zM3 10.5V2.5h8",
  remove: "M3 4.5h10M6.5 4V2.5h3V4M4.5 4.5l.6 9h5.8l.6-9M7 7v4.5M9 7v4.5",
  up: "M8 13V3M4 7l4-4 4 4",
  down: "M8 3v10M4 9l4 4 4-4",
  visible: "M1.5 8S4 3.5 8 3.5 14.5 8 14.5 8 12 12.5 8 12.5 1.5 8 1.5 8zM8 6a2 2 0 110 4 2 2 0 010-4z",
  hidden: "M1.5 8S4 3.5 8 3.5 14.5 8 14.5 8 12 12.5 8 12.5 1.5 8 1.5 8zM2.5 13.5l11-11",
  locked: "M4 7.5h8v6H4zM5.5 7.5V5a2.5 2.5 0 015 0v2.5",
  unlocked: "M4 7.5h8v6H4zM5.5 7.5V5a2.5 2.5 0 014.8-1",
};

/** The markup of an icon of 16 by 16. */
export const icon = (name) => `<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${ICONS[name]}"/></svg>`;
