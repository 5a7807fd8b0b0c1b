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
