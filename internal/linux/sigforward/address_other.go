//go:build !amd64 && !arm64

package sigforward

func addresses() (handler, back uintptr) { return 0, 0 }
