#include <cstdio>

int main() {
  std::printf("lesskv %s\n", LESSKV_VERSION);
  return 0;
}
