//go:build !(go1.26 && !go1.27)

package held

// With another release of Go, whose records have not been looked at, everything is initialised before main.
var (
	Digest, Dockerfile, SSH, Compress Library
	all                               []Library
)
