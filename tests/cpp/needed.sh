# needed.sh LIBRARY - the loader needs no part of CUDA for the library: no driver, runtime or cuFFT.
set -eu
needed=$(readelf -d "$1" | grep NEEDED)
[ -n "$needed" ] || { echo "readelf finds no library that $1 needs"; exit 1; }
echo "$needed"
case $needed in *libcu*|*libnv*) exit 1 ;; esac
