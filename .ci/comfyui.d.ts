// What the browser's modules use of ComfyUI's frontend, which is served and not installed. The types are global.

declare module "*/scripts/app.js" {
  export const app: { registerExtension(hooks: ComfyExtensionHooks): void; [other: string]: any };
}

declare module "*/scripts/api.js" {
  export const api: {
    fetchApi(route: string): Promise<Response>;
    addEventListener(event: string, heard: (event: CustomEvent) => void): void;
    apiURL(route: string): string;
  };
}

interface ComfyWidget {
  name: string;
  value: any;
  type?: string;
  serialize?: boolean;
  hidden?: boolean;
  advanced?: boolean;
  options: Record<string, any>;
  element?: HTMLElement;
  callback?: (...given: any[]) => unknown;
}

interface ComfySlot {
  name: string;
  label?: string;
  localized_name?: string;
  link?: number | null;
  links?: number[] | null;
  widget?: { name: string };
}

interface ComfyLink {
  origin_id: number;
  origin_slot: number;
  target_id: number;
  target_slot: number;
}

interface ComfyGraph {
  nodes: ComfyNode[];
  links: any;
  rootGraph?: ComfyGraph;
  subgraphs?: Map<string, ComfyGraph>;
  getNodeById(id: number): ComfyNode | null;
  beforeChange?(): void;
  afterChange?(): void;
}

interface ComfyNode {
  id: number;
  type: string;
  title: string;
  comfyClass?: string;
  graph: ComfyGraph | null;
  subgraph?: ComfyGraph;
  inputs?: ComfySlot[];
  outputs?: ComfySlot[];
  widgets?: ComfyWidget[];
  properties: Record<string, any>;
  imgs?: HTMLImageElement[];
  size: [number, number];
  flags?: { collapsed?: boolean };
  constructor: any;
  addDOMWidget(name: string, type: string, element: HTMLElement, options: Record<string, unknown>): ComfyWidget;
  removeWidget(widget: ComfyWidget): void;
  computeSize(): [number, number];
  setSize(size: [number, number]): void;
  getLayoutWidgets?(): ComfyWidget[];
  isWidgetVisible?(widget: ComfyWidget): boolean;
  setDirtyCanvas(front: boolean, back: boolean): void;
}

interface ComfyExtensionHooks {
  name: string;
  settings?: Record<string, unknown>[];
  setup?(): unknown;
  nodeCreated?(node: ComfyNode): void;
  loadedGraphNode?(node: ComfyNode): void;
  beforeRegisterNodeDef?(nodeType: any, nodeData: any): void;
  getNodeMenuItems?(node: ComfyNode): unknown[];
}

interface Window {
  LiteGraph: { vueNodesMode: boolean };
}
