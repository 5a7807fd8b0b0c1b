package engine

import (
	"errors"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"conex/internal/container"
	"conex/internal/egress"
	"conex/internal/image"
	"conex/internal/ocispec"

	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	mnet "github.com/moby/moby/api/types/network"
)

// containerTest tells whether a container is wanted.
type containerTest func(n *container.Snapshot) (bool, error)

// containerFilter compiles Docker's filters for `ps`. all is what before and since refer to.
func (e *Engine) containerFilter(filters map[string][]string, all []*container.Snapshot) (containerTest, error) {
	var tests []containerTest
	for key, values := range filters {
		if len(values) == 0 {
			continue
		}
		t, err := e.containerTest(key, values, all)
		if err != nil {
			return nil, err
		}
		tests = append(tests, t)
	}
	return func(n *container.Snapshot) (bool, error) {
		for _, t := range tests {
			if ok, err := t(n); !ok || err != nil {
				return false, err
			}
		}
		return true, nil
	}, nil
}

func (e *Engine) containerTest(key string, values []string, all []*container.Snapshot) (containerTest, error) {
	switch key {
	case "id":
		return either(func(n *container.Snapshot) bool {
			return slices.ContainsFunc(values, func(v string) bool { return strings.HasPrefix(n.Record.ID, v) })
		}), nil
	case "name":
		return nameTest(values)
	case "label":
		return either(func(n *container.Snapshot) bool { return hasLabels(n.Record.Config.Labels, values) }), nil
	case "status":
		for _, v := range values {
			if err := apic.ValidateContainerState(apic.ContainerState(v)); err != nil {
				return nil, invalid("invalid filter 'status=%s'", v)
			}
		}
		return either(func(n *container.Snapshot) bool { return slices.Contains(values, string(n.Status())) }), nil
	case "exited":
		for _, v := range values {
			if _, err := strconv.Atoi(v); err != nil {
				return nil, invalid("invalid filter 'exited=%s'", v)
			}
		}
		return either(func(n *container.Snapshot) bool {
			return n.Status() == apic.StateExited && slices.Contains(values, strconv.Itoa(n.Exit.Code))
		}), nil
	case "is-task": // there are none: no swarm
		for _, v := range values {
			if _, err := strconv.ParseBool(v); err != nil {
				return nil, invalid("invalid filter 'is-task=%s'", v)
			}
		}
		return either(func(*container.Snapshot) bool {
			return slices.ContainsFunc(values, func(v string) bool {
				task, _ := strconv.ParseBool(v) // checked above
				return !task
			})
		}), nil
	case "health":
		for _, v := range values {
			if err := apic.ValidateHealthStatus(apic.HealthStatus(v)); err != nil {
				return nil, invalid("unrecognized filter value for health: %s", v)
			}
		}
		return either(func(n *container.Snapshot) bool { return slices.Contains(values, string(healthOf(n))) }), nil
	case "ancestor":
		return e.ancestorTest(values)
	case "before", "since":
		return e.timeTest(key, values, all)
	case "network":
		return either(func(n *container.Snapshot) bool {
			for name, ep := range networks(n) {
				if slices.Contains(values, name) || slices.Contains(values, ep.NetworkID) {
					return true
				}
			}
			return false
		}), nil
	case "volume":
		return either(func(n *container.Snapshot) bool {
			return slices.ContainsFunc(n.Record.Mounts, func(m apic.MountPoint) bool {
				return m.Name != "" && slices.Contains(values, m.Name) || slices.Contains(values, m.Destination) || m.Type == mount.TypeBind && slices.Contains(values, m.Source)
			})
		}), nil
	case "egress":
		return either(func(n *container.Snapshot) bool {
			return slices.ContainsFunc(values, func(v string) bool { return egress.Matches(n.Record.Options.Egress, v) })
		}), nil
	case "publish", "expose":
		return portTest(key, values)
	default:
		return nil, invalid("invalid filter '%s'", key)
	}
}

func either(f func(*container.Snapshot) bool) containerTest {
	return func(n *container.Snapshot) (bool, error) { return f(n), nil }
}

// nameTest takes regular expressions, which match the name with and without its slash.
func nameTest(values []string) (containerTest, error) {
	match, err := patterns("name", values)
	if err != nil {
		return nil, err
	}
	return either(func(n *container.Snapshot) bool { return match("/"+n.Record.Name) || match(n.Record.Name) }), nil
}

// patterns compiles a filter's regular expressions, of which one must match.
func patterns(key string, values []string) (func(string) bool, error) {
	var res []*regexp.Regexp
	for _, v := range values {
		re, err := regexp.Compile(v)
		if err != nil {
			return nil, invalid("invalid filter '%s=%s': %w", key, v, err)
		}
		res = append(res, re)
	}
	return func(s string) bool {
		return slices.ContainsFunc(res, func(re *regexp.Regexp) bool { return re.MatchString(s) })
	}, nil
}

func hasLabels(labels map[string]string, want []string) bool {
	for _, w := range want {
		k, v, hasValue := strings.Cut(w, "=")
		got, ok := labels[k]
		if !ok || hasValue && got != v {
			return false
		}
	}
	return true
}

func healthOf(n *container.Snapshot) apic.HealthStatus {
	if a := n.Alive(); a != nil && a.Health != nil {
		return a.Health.Status
	}
	return apic.NoHealthcheck
}

// ancestorTest takes images by name or id: a container matches that was made of it, or of an image that was built on it.
func (e *Engine) ancestorTest(values []string) (containerTest, error) {
	images, err := e.Images()
	if err != nil {
		return nil, err
	}
	var bases []image.Image
	for _, v := range values {
		img, err := images.Resolve(v)
		if errors.Is(err, image.ErrNotFound) || errors.Is(err, image.ErrReference) {
			continue // nothing is made of it
		}
		if err != nil {
			return nil, err
		}
		bases = append(bases, img)
	}
	return either(func(n *container.Snapshot) bool {
		return slices.ContainsFunc(bases, func(b image.Image) bool {
			return n.Record.ImageID == b.ID || beginsWith(n.Record.Layers, b.Layers()) &&
				(len(n.Record.Layers) > len(b.Layers()) || continues(images, n.Record.ImageID, b))
		})
	}), nil
}

// continues reports whether the image of that id, which has base's layers and no more, was built on base: of two such, an image and
// one that changes its configuration, the history tells which was first.
func continues(images *image.Store, id ocispec.Digest, base image.Image) bool {
	img, err := images.Get(id)
	if err != nil {
		return false // it is gone: nobody can tell
	}
	h, b := img.Config.History, base.Config.History
	return len(h) > len(b) && slices.EqualFunc(h[:len(b)], b, func(x, y ocispec.History) bool { return reflect.DeepEqual(x, y) })
}

func beginsWith(layers, base []ocispec.Digest) bool {
	return len(base) > 0 && len(layers) >= len(base) && slices.Equal(layers[:len(base)], base)
}

func (e *Engine) timeTest(key string, values []string, all []*container.Snapshot) (containerTest, error) {
	id, err := e.Containers().Resolve(values[len(values)-1])
	if err != nil {
		return nil, classify(err)
	}
	i := slices.IndexFunc(all, func(n *container.Snapshot) bool { return n.Record.ID == id })
	if i < 0 {
		return nil, classify(&container.NotFoundError{Name: values[len(values)-1]})
	}
	at := all[i].Record.Created
	return either(func(n *container.Snapshot) bool {
		if key == "before" {
			return n.Record.Created.Before(at)
		}
		return n.Record.Created.After(at)
	}), nil
}

// portTest takes "80", "80/udp", "80-90/tcp".
func portTest(key string, values []string) (containerTest, error) {
	var ranges []mnet.PortRange
	for _, v := range values {
		r, err := mnet.ParsePortRange(v)
		if err != nil {
			return nil, invalid("invalid filter '%s=%s': %w", key, v, err)
		}
		ranges = append(ranges, r)
	}
	in := func(num uint16, proto string) bool {
		return slices.ContainsFunc(ranges, func(r mnet.PortRange) bool {
			return string(r.Proto()) == proto && r.Start() <= num && num <= r.End()
		})
	}
	return either(func(n *container.Snapshot) bool {
		if key == "publish" {
			return slices.ContainsFunc(portSummaries(n), func(p apic.PortSummary) bool { return p.PublicPort != 0 && in(p.PublicPort, p.Type) })
		}
		for p := range n.Record.Config.ExposedPorts {
			if in(p.Num(), string(p.Proto())) {
				return true
			}
		}
		return false
	}), nil
}
