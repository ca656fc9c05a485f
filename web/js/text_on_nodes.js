// What a node of this pack says when it has run stays on it: ComfyUI's own front end draws a node's
// `ui.text` on Preview as Text alone. Text and picture are kept in the node's properties, so that they are
// there again when the workflow is opened; widgets would shift the order of the values that are saved.
import { app } from "../../../scripts/app.js"
import { api } from "../../../scripts/api.js"

const NAME = "visual_concepts_text"
const PICTURE = "visual_concepts_picture"
const PROGRESS = "$$node-text-preview"
export const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split("/extensions/")[1].split("/")[0])
const LINE = 17
const LETTER = 5.8
const MARGIN = 48
const MOST = 8
const AROUND = 20
const ROOM = 200

function textElement() {
  const element = document.createElement("div")
  Object.assign(element.style, {
    boxSizing: "border-box",
    color: "var(--input-text, #ddd)",
    background: "var(--comfy-input-bg, #222)",
    border: "1px solid transparent",
    borderRadius: "4px",
    padding: "4px 8px",
    font: `12px/${LINE}px sans-serif`,
    whiteSpace: "pre-wrap",
    overflowWrap: "anywhere",
    overflowY: "auto",
    userSelect: "text"
  })
  element.dataset.testid = NAME
  return element
}

/** What the text needs, up to a bound: what does not fit is scrolled. */
function heightOf(node, element) {
  const across = (node.size[0] - MARGIN) / LETTER
  const wrapped = element.textContent.split("\n").map((line) => Math.max(1, Math.ceil(line.length / across)))
  const lines = wrapped.reduce((sum, each) => sum + each, 0)
  const picture = element.querySelector("img") ? ROOM : 0
  return Math.min(MOST, lines) * LINE + 10 + picture
}

function addText(node) {
  const element = textElement()
  // The editor takes a margin above and below from what a widget asks for.
  const height = () => heightOf(node, element) + AROUND
  const options = { serialize: false, hideOnZoom: false, getMinHeight: height, getMaxHeight: height }
  const widget = node.addDOMWidget(NAME, NAME, element, options)
  widget.serialize = false
  return widget
}

function remove(node, name) {
  const widget = node.widgets?.find((each) => each.name === name)
  if (!widget) return
  if (node.removeWidget) node.removeWidget(widget)
  else {
    widget.onRemove?.()
    node.widgets.splice(node.widgets.indexOf(widget), 1)
  }
}

export function isOurs(node) {
  return node?.constructor?.nodeData?.python_module === `custom_nodes.${FOLDER}`
}

/** Keep nothing of what a node said; it stays written until it is overwritten. */
export function forget(node) {
  delete node.properties[NAME]
  delete node.properties[PICTURE]
}

/** Take what a node said off it. */
export function hide(node) {
  forget(node)
  remove(node, NAME)
  node.graph?.setDirtyCanvas(true, true)
}

/** Write on a node, an error in its colour, above a picture if there is one. */
export function show(node, text, { wrong = false, picture } = {}) {
  const widget = node.widgets?.find((each) => each.name === NAME) ?? addText(node)
  widget.element.textContent = text
  widget.element.style.color = wrong ? "var(--error-text, #f66)" : "var(--input-text, #ddd)"
  widget.element.style.borderColor = wrong ? "var(--error-text, #f66)" : "transparent"
  if (picture) widget.element.append(pictureElement(picture, () => show(node, text, { wrong })))
  widget.element.style.maxHeight = `${heightOf(node, widget.element)}px`
  const [width, height] = node.computeSize()
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)])
  node.graph?.setDirtyCanvas(true, true)
}

function pictureElement(of, without) {
  const element = document.createElement("img")
  Object.assign(element.style, { display: "block", width: "100%", height: `${ROOM - 8}px`, objectFit: "contain" })
  // ComfyUI empties its folder of temporary files when it starts.
  element.onerror = without
  element.src = api.apiURL(`/view?${new URLSearchParams(of)}`)
  return element
}

function hasPreview(node) {
  const graph = node.graph
  const name = graph === (app.rootGraph ?? app.graph) ? String(node.id) : `${graph?.id}:${node.id}`
  return Boolean(app.nodePreviewImages?.[name]?.length)
}

/** Keep what a node says, and write it. The front end draws `images` and the last preview by itself. */
function keep(node, output) {
  const text = [output.text].flat().join("\n").trim()
  const [picture] = output.picture ?? output.images ?? []
  const missing = output.images || hasPreview(node) ? undefined : picture
  remove(node, PROGRESS)
  if (!text && !missing) hide(node)
  else show(node, text, { picture: missing })
  node.properties[NAME] = text
  node.properties[PICTURE] = picture
}

/** Make what nodes say part of the workflow as it is kept for a reload of the page. */
function remember() {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker
  ;(tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker)
}

api.addEventListener("execution_success", remember)

app.registerExtension({
  name: "visualconcepts.TextOnNodes",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.python_module !== `custom_nodes.${FOLDER}`) return
    const { onExecuted, onConfigure } = nodeType.prototype
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments)
      if (output?.text) keep(this, output)
    }
    nodeType.prototype.onConfigure = function () {
      onConfigure?.apply(this, arguments)
      const text = this.properties?.[NAME]
      const picture = this.properties?.[PICTURE]
      if (text || picture) show(this, text ?? "", { picture })
    }
  }
})
