package build

import (
	"fmt"
	"strings"

	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/registry"
)

// platform is this machine's.
func platform() ocispec.Platform { return registry.HostPlatform() }

func platformString(p ocispec.Platform) string { return registry.FormatPlatform(p) }

// parsePlatform reads --platform's value, of the command line or of FROM. conex builds for Linux.
func (p *planner) parsePlatform(s string) (ocispec.Platform, error) {
	if strings.Contains(s, ",") {
		return ocispec.Platform{}, fmt.Errorf("platform %q: one at a time: build each with a tag of its own and join them with \"manifest create\"", s)
	}
	plat, err := registry.ParsePlatform(s)
	if err != nil {
		return plat, fmt.Errorf("platform %w", err)
	}
	if plat.OS != "linux" {
		return plat, fmt.Errorf("platform %q: conex builds images for linux", s)
	}
	return plat, nil
}

// fits is an error unless an image is for a platform. An image that says nothing is for any.
func fits(ref string, img image.Image, plat ocispec.Platform) error {
	have := img.Config.Platform
	if have.OS == "" && have.Architecture == "" || registry.Fits(plat, have) >= 0 {
		return nil
	}
	return fmt.Errorf("%s is for %s, not for %s", ref, registry.FormatPlatform(have), registry.FormatPlatform(plat))
}

// stamp gives the target's config the platform that was asked for, whatever the stage was made on, as BuildKit does: the last stage may
// stand on an image of this machine that made the files of another.
func (p *planner) stamp(s *stage) {
	have := &s.cfg.image.Platform
	if want := p.platform; p.req.Platform != "" {
		same := have.OS == want.OS && have.Architecture == want.Architecture
		have.OS, have.Architecture = want.OS, want.Architecture
		if want.Variant != "" || !same {
			have.Variant = want.Variant
		}
		if !same {
			have.OSVersion, have.OSFeatures = "", nil
		}
	}
	if n, err := registry.ParsePlatform(registry.FormatPlatform(*have)); err == nil {
		have.Variant = n.Variant // one spelling of it
	}
}
