package mount

// UseAttachedLayers makes overlays as on a kernel whose overlayfs takes no descriptors.
func UseAttachedLayers(on bool) { noLayerFDs.Store(on) }
