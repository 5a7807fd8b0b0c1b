package config

import (
	"fmt"
	"strconv"
	"strings"
)

// DefaultUsernsRange are the ids that containers with user namespaces of their own get theirs from: 4096 times 65536, above those
// that distributions give to people and services and to subuid(5), below 2^31.
const DefaultUsernsRange = "1342177280:268435456"

// IDRange is a range of user and group ids.
type IDRange struct{ First, Size uint32 }

func (r IDRange) String() string { return fmt.Sprintf("%d:%d", r.First, r.Size) }

// ParseIDRange reads FIRST:SIZE; empty is the default.
func ParseIDRange(s string) (IDRange, error) {
	if s == "" {
		s = DefaultUsernsRange
	}
	a, b, ok := strings.Cut(s, ":")
	first, err1 := strconv.ParseUint(a, 10, 32)
	size, err2 := strconv.ParseUint(b, 10, 32)
	if !ok || err1 != nil || err2 != nil || first < 1<<16 || size < 1<<16 || first+size > 1<<32-1 {
		return IDRange{}, fmt.Errorf("userns-range %q: want FIRST:SIZE, with a FIRST and a SIZE of 65536 or more and an end below 4294967295", s)
	}
	return IDRange{uint32(first), uint32(size)}, nil
}
