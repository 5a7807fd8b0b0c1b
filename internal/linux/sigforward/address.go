//go:build amd64 || arm64

package sigforward

// addresses returns the handler's, and that of what it returns to where the kernel does not bring that itself.
func addresses() (handler, back uintptr)
